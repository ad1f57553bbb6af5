"""What the documents say of evaluations is what was measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.evaluation_docs import DOCUMENTS, MARKER, RESULTS, filled, without_places
from ldbfr.config import DEFAULT_WEIGHTS
from ldbfr.errors import InputError
from ldbfr.evaluation.results import Results
from ldbfr.weights import find_weights, manifest_digest, read_manifest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_table_is_that_of_its_results(name: str) -> None:
    text = (REPOSITORY / name).read_text("utf-8")
    assert MARKER.search(text)
    assert text == filled(text)


def test_the_reference_weights_tables_are_theirs() -> None:
    text = "".join((REPOSITORY / name).read_text("utf-8") for name in DOCUMENTS)
    digest = manifest_digest(read_manifest(find_weights(DEFAULT_WEIGHTS)))
    names = {found[2] for found in MARKER.finditer(text) if DEFAULT_WEIGHTS in found[2]}
    assert names
    for name in names:
        results = Results.model_validate_json((RESULTS / f"{name}.json").read_text("utf-8"))
        digests = {about["weights_digest"] for about in results.restorers.values() if "weights_digest" in about}
        assert digests == {digest}, name


def test_kept_results_name_no_machine() -> None:
    for name in {found[2] for one in DOCUMENTS for found in MARKER.finditer((REPOSITORY / one).read_text("utf-8"))}:
        text = (RESULTS / f"{name}.json").read_text("utf-8")
        assert not re.search(r'[" ]/(root|home|tmp|work|Users)/', text), name


def test_places_are_cut_and_addresses_are_not() -> None:
    given = {
        "place": "/data/set",
        "said": "put x.pth into /root/.cache/ldbfr; it is at https://a.org/b/c.pth",
        "n": [1],
    }
    assert without_places(given) == {"said": "put x.pth into ldbfr; it is at https://a.org/b/c.pth", "n": [1]}
    assert without_places("ldbfr evaluate /a/b/val --output out/val") == "ldbfr evaluate val --output out/val"


def test_a_marker_without_results_is_an_error_in_words() -> None:
    with pytest.raises(InputError, match=r"nowhere\.json is not there"):
        filled("<!-- table nowhere all -->\n<!-- end -->")
    two = "<!-- reason nowhere -->\n<!-- end -->\n\n<!-- table b all x; y -->\n<!-- end -->"
    assert [found.groups() for found in MARKER.finditer(two)] == [("reason", "nowhere", ""), ("table", "b", "all x; y")]
    assert filled("nothing is marked") == "nothing is marked"
