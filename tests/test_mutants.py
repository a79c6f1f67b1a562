"""The list of planted bugs fits the source. `python -m tests.mutants` shows who notices them."""

import ast
import re

import pytest

from tests.mutants import MUTANTS, ROOT, files_that_notice, planted


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_fits_the_source_once(mutant):
    ast.parse(planted(mutant))
    assert mutant.old != mutant.new


def test_a_bug_is_looked_for_in_files_that_there_are():
    missing = [file for file in files_that_notice(MUTANTS) if not (ROOT / file).is_file()]
    assert not missing


def test_every_planted_bug_has_a_name_of_its_own():
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)


def test_a_replacement_that_fits_no_longer_is_named():
    gone = MUTANTS[0]._replace(old="no such text")
    with pytest.raises(ValueError, match=f"{re.escape(gone.name)}: .* 0 times in {gone.file}"):
        planted(gone)
