__version__ = "0.1.0"


def load(source="s2hand", **options):
    "A trained network: a system's name, for the one that travels with the package, or a checkpoint file of any system."
    from importlib import import_module          # here, so that `import handrecon` stays light

    from handrecon.runs import SYSTEMS
    from handrecon.training import load_checkpoint
    system = str(source) if str(source) in SYSTEMS else load_checkpoint(source).meta["system"]
    return import_module(f"handrecon.{system}").load(source, **options)
