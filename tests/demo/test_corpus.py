from dataclasses import replace
from pathlib import Path

from services.demo.corpus import code_documents, is_held_out, skipped_path, without_license
from services.demo.recipe import FleetRecipe, Package


def test_whole_files_are_held_out(fleet: FleetRecipe, package: Path):
    documents = code_documents(fleet.corpus)
    held_out = {document.name for document in documents if document.held_out}
    assert 0 < len(held_out) < len(documents) == 40
    assert all(document.held_out == is_held_out(document.name, fleet.corpus) for document in documents)
    assert all(document.text == (package.parent / document.name).read_text() for document in documents)
    trained = "".join(document.text for document in documents if not document.held_out)
    assert not any(name.removeprefix("smallshop/").removesuffix(".py") + " of a" in trained for name in held_out)


def test_same_documents_each_time(fleet: FleetRecipe):
    assert code_documents(fleet.corpus) == code_documents(fleet.corpus)
    other = replace(fleet.corpus, seed=5)
    assert [document.name for document in code_documents(other)] != [document.name for document in code_documents(fleet.corpus)]


def test_a_file_stays_held_out_when_others_come_and_go(fleet: FleetRecipe, package: Path):
    before = {document.name: document.held_out for document in code_documents(fleet.corpus)}
    (package / "thing0.py").unlink()
    after = {document.name: document.held_out for document in code_documents(fleet.corpus)}
    assert after == {name: held_out for name, held_out in before.items() if name != "smallshop/thing0.py"}


def test_copies_tables_and_generated_files_are_left_out(fleet: FleetRecipe, package: Path):
    original = (package / "thing1.py").read_text()
    (package / "copy.py").write_text(original)
    (package / "table.py").write_text("TABLE = [" + "1234567890, " * 30 + "]\n")
    (package / "generated.py").write_text(f"# This file was automatically generated.\n{original}1")
    (package / "marked.py").write_text(f"{original}MARK = '<|endoftext|>'\n")
    (package / "test_thing.py").write_text(f"{original}2")
    texts = [document.text for document in code_documents(fleet.corpus)]
    assert len(texts) == len(set(texts)) == 40


def test_the_cap_bounds_a_package(fleet: FleetRecipe, package: Path):
    capped = replace(fleet.corpus, packages=(Package(package.name, code_bytes=4_000),))
    assert 2_000 < sum(len(document.text) for document in code_documents(capped)) <= 4_000


def test_a_missing_package_gives_nothing(fleet: FleetRecipe):
    assert code_documents(replace(fleet.corpus, packages=(Package("no_such_package_anywhere"),))) == []


def test_paths_that_are_skipped():
    for path in ("test/regrtest.py", "pip/_vendor/rich.py", "encodings/cp037.py", "a/test_b.py", "site-packages/x.py", "proto/a_pb2.py"):
        assert skipped_path(path), path
    for path in ("json/encoder.py", "nn/modules/linear.py", "contest.py", "latest/api.py", "doctest.py"):
        assert not skipped_path(path), path


def test_a_licence_header_is_dropped_and_other_comments_stay():
    assert without_license("#!/bin/python\n# Copyright 2020\n\n# more\nimport os\n") == "import os\n"
    assert without_license("# Sorting things\nimport os\n") == "# Sorting things\nimport os\n"
