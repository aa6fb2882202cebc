"""Tables that pages include: made from the library, so that they cannot disagree with it."""
from handrecon import conventions


def joint_orders() -> str:
    "Where each of our 21 joints is kept by others."
    names = ["ho3d", "s2hand-mano", "rhd", "stb", "interhand"]
    rows = ["| | joint | " + " | ".join(names) + " |", "|---|---" + "|---" * len(names) + "|"]
    for i, joint in enumerate(conventions.JOINT_NAMES):
        rows.append(f"| {i} | {joint} | " + " | ".join(str(conventions.JOINT_ORDERS[name][i]) for name in names) + " |")
    return "\n".join(rows) + "\n"


def joint_limits() -> str:
    "Degrees, in MANO's local axes."
    rows = ["| joint | x | y | z |", "|---|---|---|---|"]
    for name, limits in zip(conventions.MANO_JOINT_NAMES[1:], conventions.JOINT_LIMITS_DEGREES):
        rows.append(f"| {name} | " + " | ".join(f"{low} to {high}" for low, high in limits) + " |")
    return "\n".join(rows) + "\n"


def fragments() -> dict[str, str]:
    return {"generated/joint_orders.md": joint_orders(), "generated/joint_limits.md": joint_limits()}
