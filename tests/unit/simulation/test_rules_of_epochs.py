"""What only the whole history of a store shows: whose an epoch is, what a head stands for, and who
has gone, also where the store has lost that it knew."""

from __future__ import annotations

from loadtest.simulation.checkers.ledgers import digest_of
from loadtest.simulation.checkers.witness import Witness
from statestore import keys
from statestore.executor import Script, ScriptCall

SESSION, SALT = "ses_f", b"salt"
ZEROS, ONES = bytes(8), b"\1\0\0\0"
KEEP_TWO = (5, b"n", 2, b"", 2, ONES)


class Store:
    """One session, and the fleet."""

    def __init__(self) -> None:
        self.values: dict[str, object] = {
            keys.salt_key("t"): SALT,
            keys.ledger_key(SESSION): ZEROS,
            keys.FLEET: {b"inc:r1": b"1", b"gone:r1": b"0"},
        }
        self.write(ZEROS, 5, b"n", b"r1")
        self.witness = Witness(self.values.get)
        self.after("place")

    def write(self, ledger: bytes, epoch: int, nonce: bytes, owner: bytes) -> None:
        self.values[keys.ledger_key(SESSION)] = ledger
        self.values[keys.session_key(SESSION)] = {
            b"tenant": b"t",
            b"state": b"OPEN",
            b"length": b"%d" % (len(ledger) // 4),
            b"digest": digest_of(SALT, ledger),
            b"epoch": b"%d" % epoch,
            b"nonce": nonce,
            b"owner": owner,
            b"owner_inc": b"1",
            b"active": b"",
        }

    def after(self, script: str, *args: bytes | int) -> list[str]:
        """What is told of a script that left the store as it is."""
        self.witness.violations.clear()
        call = ScriptCall(Script(script, ""), (keys.session_key(SESSION),), args)
        self.witness(call, [b"done"])
        return [told.partition(": ")[2].partition(": ")[2] for told in self.witness.violations]

    def lose(self, ledger: bytes, epoch: int, nonce: bytes, owner: bytes) -> None:
        self.write(ledger, epoch, nonce, owner)
        self.witness.forget()

    def repair(self, ledger: bytes, epoch: int, nonce: bytes, owner: bytes) -> list[str]:
        self.write(ledger, epoch, nonce, owner)
        head = len(ledger) // 4, digest_of(SALT, ledger)
        return self.after("repair", epoch, nonce, owner, 1, *KEEP_TWO, *head, b"", 0)


def test_a_later_epoch_is_granted_and_repairs_when_it_was_lost() -> None:
    store = Store()
    store.write(ZEROS, 6, b"m", b"r2")
    assert store.after("take", 5, b"n") == []
    store.write(ZEROS + ONES, 6, b"m", b"r2")
    assert store.after("append", 6, b"m") == []
    store.lose(ZEROS, 5, b"n", b"r1")
    assert store.repair(ZEROS + ONES, 6, b"m", b"r2") == []


def test_nobody_repairs_under_an_epoch_that_was_not_granted() -> None:
    store = Store()
    store.lose(ZEROS[:4], 5, b"n", b"r1")
    assert store.repair(ZEROS, 7, b"x", b"r2")[-1].startswith("P2: ")


def test_a_lost_number_is_not_granted_again() -> None:
    store = Store()
    store.write(ZEROS, 6, b"m", b"r2")
    store.after("take", 5, b"n")
    store.lose(ZEROS, 5, b"n", b"r1")
    store.write(ZEROS, 6, b"x", b"r3")
    assert store.after("take", 5, b"n") == ["P2: epoch 6 was granted before"]


def test_an_epoch_is_its_owners() -> None:
    store = Store()
    store.write(ZEROS, 6, b"m", b"r2")
    store.after("take", 5, b"n")
    store.lose(ZEROS, 5, b"n", b"r1")
    store.write(ZEROS, 6, b"m", b"r3")
    (what,) = store.after("take", 5, b"n")
    assert what.startswith("P2: epoch 6 of ")


def test_a_head_of_other_tokens_is_told() -> None:
    store = Store()
    store.write(ZEROS + ONES, 5, b"n", b"r1")
    store.values[keys.ledger_key(SESSION)] = ZEROS + ZEROS[:4]
    (what,) = store.after("append", 5, b"n")
    assert what.startswith("P1: ")


def test_judging_goes_on_with_the_first_script_after_a_loss() -> None:
    store = Store()
    store.lose(ZEROS[:4], 5, b"n", b"r1")
    store.write(ONES, 5, b"n", b"r1")
    assert store.after("append", 5, b"n") == ["I1: the ledger was rewritten"]


def test_who_said_good_bye_stays_gone_when_the_store_forgets_it() -> None:
    store, ref = Store(), (b"r1", b"1")
    store.values[keys.FLEET] = {b"inc:r1": b"1", b"gone:r1": b"1"}
    store.after("mark_replica")
    store.values[keys.FLEET] = {b"inc:r1": b"1", b"gone:r1": b"0"}
    store.witness.forget()
    assert store.witness.is_unfit(ref)
