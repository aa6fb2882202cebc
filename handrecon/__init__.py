__version__ = "0.1.0"


def __getattr__(name):
    "`handrecon.load`, without making `import handrecon` import a network."
    if name == "load":
        from handrecon.s2hand import load
        return load
    raise AttributeError(f"module 'handrecon' has no attribute {name!r}")
