"""The parts of `doctor`: the inventory of home, one function per check, and what can be done."""
