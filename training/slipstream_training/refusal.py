"""An operator's mistake. Owns nothing but its name; `cli.py` tells it in one line and ends with status 2."""


class Refusal(ValueError):
    """What was asked for cannot be done; the message names the flag to change and the limit."""
