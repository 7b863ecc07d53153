"""A demo fleet small enough to build in a second: one package of generated files, a one-layer model."""

from pathlib import Path

import pytest

from services.demo.recipe import CorpusRecipe, FleetRecipe, ModelRecipe, Optimization, Package, Phase, TokenizerRecipe

CODE = '''"""Keeps the {noun} of a small shop, one file for each kind of thing."""


class {title}Shelf:
    """Holds {noun} in the order they came, and forgets the oldest when full."""

    def add_{noun}(self, name: str, count: int = {index}) -> bool:
        """Puts some {noun} on the shelf.

        The shelf of {noun} takes as many as there is room for.

        Args:
            name: what it is called.
        """
        for place in range(count):
            self.places.append((name, place))
        return bool(self.places)
'''


def write_package(folder: Path, files: int) -> None:
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    for index in range(files):
        noun = f"thing{index}"
        (folder / f"{noun}.py").write_text(CODE.format(noun=noun, title=noun.title(), index=index))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an importable package `smallshop` with 40 files."""
    folder = tmp_path / "packages" / "smallshop"
    write_package(folder, 40)
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


@pytest.fixture
def fleet(package: Path, tmp_path: Path) -> FleetRecipe:
    phases = (Phase(0.5, 16, 4), Phase(1.0, 32, 2))
    optimization = Optimization(phases=phases, micro_tokens=32, log_steps=4, checkpoint_seconds=0.0)
    sizes = {"hidden": 64, "layers": 1, "heads": 1, "intermediate": 32, "steps": 8, "optimization": optimization}
    return FleetRecipe(
        corpus=CorpusRecipe((Package(package.name),), held_out=0.2),
        tokenizer=TokenizerRecipe(vocab_size=320),
        models=(ModelRecipe("toy-code", "code", seed=1, **sizes), ModelRecipe("toy-chat", "chat", seed=2, **sizes)),
        build_folder=tmp_path / "build",
        models_folder=tmp_path / "models",
    )
