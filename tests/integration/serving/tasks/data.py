"""Three small tasks for lm-evaluation-harness, of which the trained miniature knows something."""

from datasets import Dataset

CHOICES = [
    ("If the object does not exist, an exception is", [" raised", " sea", " yellow"]),
    ("The function returns None if there is no such", [" file", " and", " green"]),
    ("A list of strings is", [" returned", " Monday", " whether"]),
    ("the default value of the", [" argument", " was", " seven"]),
    ("Changed in version", [" 3.8", " apple", " who"]),
    ("for i in", [" range", " because", " raised"]),
    ("Return True if the string is", [" empty", " kitchen", " of of"]),
    ("The value of this attribute is", [" a string", " and or", " walked"]),
]
"""Beginnings, and how each could go on; the first one fits."""
TEXT = (
    "A program often has to wait for a slow disk or a busy network. When a file cannot be opened, "
    "the function raises an error which says its name and the reason.\n\nA value of None means "
    "that there is no limit. The caller decides what to do."
)


def choices(**_):
    rows = []
    for number, (text, listed) in enumerate(CHOICES):
        place = number % len(listed)
        turned = listed[-place:] + listed[:-place] if place else listed
        rows.append({"text": text, "choices": turned, "answer": place})
    return {"test": Dataset.from_list(rows)}


def answers(**_):
    rows = [{"text": text, "answer": listed[0]} for text, listed in CHOICES[:3]]
    return {"test": Dataset.from_list(rows)}


def texts(**_):
    return {"test": Dataset.from_list([{"text": TEXT}])}
