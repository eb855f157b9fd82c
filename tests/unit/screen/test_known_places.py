"""Folders of links under home are named as the user knows them."""

from pathlib import Path

import pytest

from grokctl.screen.known_places import KnownPlaces

LINKS = "/home/me/adopted/0123456789ab/f1"


@pytest.mark.parametrize(
    ("shown", "text", "expected"),
    [
        ("f1", f"{LINKS}: is sound", "f1: is sound"),
        ("my f1", f"{LINKS}: is sound", "my f1: is sound"),
        ("f1", f"not proven (grokctl verify {LINKS})", "not proven (grokctl verify f1)"),
        ("my f1", f"not proven (grokctl verify {LINKS})", "not proven (grokctl verify 'my f1')"),
        ("f1", f"{LINKS}/config.json: is missing", "f1/config.json: is missing"),
        ("f1", f"{LINKS}0: is another", f"{LINKS}0: is another"),
        ("f1", "f2: is another", "f2: is another"),
    ],
)
def test_a_note_or_an_error_names_what_was_typed(shown, text, expected):
    places = KnownPlaces()
    places.add(Path(LINKS), Path(shown))

    assert places.named(text) == expected


@pytest.mark.parametrize(
    ("place", "shown", "hint", "expected"),
    [
        (LINKS, "my f1", f"grokctl verify {LINKS} --repair", "grokctl verify 'my f1' --repair"),
        (LINKS, "my f1", f"ls -l {LINKS}/config.json  # x", "ls -l 'my f1/config.json'  # x"),
        (f"{LINKS} x", "f1", f"grokctl verify '{LINKS} x' --repair", "grokctl verify f1 --repair"),
        (f"{LINKS} x", "f1", f"ls -l '{LINKS} x/config.json'", "ls -l f1/config.json"),
    ],
)
def test_a_hint_can_be_pasted(place, shown, hint, expected):
    places = KnownPlaces()
    places.add(Path(place), Path(shown))

    assert places.named(hint, is_command=True) == expected
