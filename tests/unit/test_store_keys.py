"""Names of keys, and the scripts that use them."""

from __future__ import annotations

import re

import pytest
from redis.cluster import key_slot  # type: ignore[attr-defined]

from statestore import keys
from statestore.records import ReplicaRef
from statestore.scripts import load_script, script_names

LIBRARIES = re.compile(r"\b(cjson|cmsgpack|struct|bit|os|io|redis\.(?!call\b)\w+)\b\s*[.(]")


@pytest.mark.parametrize(
    ("session_id", "family"),
    [("ses_abc", "abc"), ("ses_abc.x1", "abc"), ("ses_a-b_c.d.e", "a-b_c")],
)
def test_an_id_alone_finds_its_family(session_id: str, family: str) -> None:
    assert keys.family_of(session_id) == family


@pytest.mark.parametrize(
    "session_id", ["", "abc", "ses_", "ses_a.", "ses_{a}", "ses_a:b", "ses_a,b", "ses_" + "a" * 65]
)
def test_what_is_no_session_id_is_refused(session_id: str) -> None:
    with pytest.raises(ValueError, match="not a session id"):
        keys.session_key(session_id)


def test_all_keys_of_a_family_are_in_one_slot() -> None:
    names = [
        keys.session_key("ses_f"),
        keys.ledger_key("ses_f"),
        keys.refs_key("ses_f.a"),
        keys.session_key("ses_f.b"),
        keys.ledger_key("ses_f.b"),
    ]
    assert len(set(names)) == len(names)
    assert len({key_slot(name.encode()) for name in names}) == 1


def test_each_incarnation_of_a_replica_has_an_index_of_its_own() -> None:
    assert keys.replica_index_key(ReplicaRef("r", 1)) != keys.replica_index_key(ReplicaRef("r", 2))


@pytest.mark.parametrize("name", script_names())
def test_scripts_keep_to_what_any_lua_has(name: str) -> None:
    assert not LIBRARIES.search(load_script(name).source)
