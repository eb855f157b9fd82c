import re
from itertools import chain

from places import PROJECT

ROWS = re.findall(
    r"^\| [^|`]+ \| (.*) \|$", (PROJECT / "docs/map.md").read_text("utf-8"), re.MULTILINE
)


def test_the_map_names_every_module_in_one_place_only():
    modules = {
        path.relative_to(PROJECT / "grokctl").with_suffix("").as_posix()
        for path in (PROJECT / "grokctl").rglob("*.py")
        if path.name != "__init__.py"
    }
    named = list(chain.from_iterable(re.findall(r"`([\w/*]+)`", row) for row in ROWS))

    assert len(named) == len(set(named))
    whole = {name.removesuffix("*") for name in named if name.endswith("/*")}
    assert whole == {
        f"{path.name}/" for path in (PROJECT / "grokctl").iterdir() if any(path.glob("*.py"))
    }
    plain = {name for name in named if not name.endswith("/*")}
    assert plain <= modules
    assert {module for module in modules if "/" not in module} <= plain
