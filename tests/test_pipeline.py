"""The whole pipeline, for real, on a miniature: what `grokctl demo` does and what is left of it."""

from grokctl import demo
from grokctl.checkpoint.ready import open_ready
from grokctl.events import Finished, Stage
from grokctl.paths import Home


def test_the_demo_fetches_verifies_reshards_and_says_the_same_on_every_mesh(tmp_path):
    seen = []

    found = demo.demo(tmp_path / "demo", observe=seen.append)

    assert set(found.texts) == {8, 4, 16}
    assert found.agrees
    assert next(iter(found.texts.values()))
    assert [event.stage for event in seen if isinstance(event, Finished)].count(Stage.LOAD) == 3
    ready = [open_ready(path) for path in sorted(Home(tmp_path / "demo" / "home").ready.iterdir())]
    assert sorted(checkpoint.mesh.size for checkpoint in ready) == [4, 8, 16]
    assert all(checkpoint.source.proven for checkpoint in ready)
    assert all(step.seconds >= 0 for step in found.steps)
