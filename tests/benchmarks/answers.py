"""Functions that tests call in a fresh process."""


def where(number):
    import torchdsc

    return {"number": number, "torchdsc": torchdsc.__file__}


def fail():
    raise ValueError("no such number")
