"""From a dispatched request to a turn that may generate: accepted here, or resumed here.

Everything that can be refused is refused before the ledger is written. What is in the ledger is
then the turn's only definition; a retry or another replica starts from it, not from the request.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import anyio
from sessile.v1 import replica_pb2, types_pb2

from gateway.core.errors import (
    DataLoss,
    InternalError,
    InvalidRequest,
    NotFound,
    NotOwner,
    SessileError,
    StaleClient,
    TurnCancelled,
    TurnConflict,
    TurnInProgress,
    Unavailable,
)
from statestore import ports as store
from statestore.digest import RollingDigest
from statestore.records import Epoch, Position, Session, SessionState, Turn, TurnContext
from workers.journal import until_answered
from workers.residency import ResidentSession
from workers.text.port import BadMessages, LastTurn
from workers.turn.output import TurnOutput
from workers.turn.ports import TurnPorts, read_context, refusal
from workers.turn.repair import broken_off, is_behind, repair
from workers.turn.request import (
    DEFAULT_TIMEOUT_MS,
    TurnPlan,
    body_of,
    chat_messages,
    chat_tools,
    input_digest,
    plan_of,
    preamble_of,
    resolve,
)

MAX_RACES = 4
"""Times an opening starts over because the session changed between look and write."""

SEAL_EVERY = 512
"""Replayed output can be sent in events of this many tokens."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A turn that is RUNNING under our epoch. ``resident`` holds the ledger up to
    ``turn.output_end``, and ``output`` the journalled output, folded."""

    turn: Turn
    resident: ResidentSession
    plan: TurnPlan
    output: TurnOutput
    deadline_at: float
    """In the event loop's clock; the store judges by its own."""
    began: bool
    """Accepted by this call, not resumed."""


def check_precondition(pre: types_pb2.Precondition, session: Session) -> None:
    """Raises DataLoss if the client knows more than the ledger, StaleClient if it knows less."""
    head = pre.head
    if pre.turn_index > session.turn_index or head.length > session.head.length:
        raise DataLoss(
            f"the client knows {head.length} tokens and {pre.turn_index} turns, the ledger "
            f"{session.head.length} and {session.turn_index}"
        )
    if pre.turn_index < session.turn_index or head.length < session.head.length:
        raise StaleClient(
            f"the ledger has {session.head.length} tokens and {session.turn_index} turns, the "
            f"client knows {head.length} and {pre.turn_index}"
        )
    if head.digest and head.digest != session.head.digest:
        raise DataLoss(f"the ledger's first {head.length} tokens are not those the client knows")


def check_input(turn: types_pb2.RunTurnRequest, known: Turn, salt: bytes) -> None:
    """A repeat brings the same input or none; raises TurnConflict."""
    if turn.messages and input_digest(salt, turn) != known.spec.input_digest:
        raise TurnConflict(f"turn {turn.turn_id} exists with other input")


def missing_turn(request: types_pb2.RunTurnRequest) -> SessileError:
    """The answer to who only attaches to a turn that the ledger does not have: whether it was ever
    accepted, only a client that has some of it can tell (P1)."""
    heard = request.resume_from.length
    if heard:
        return _lost_turn(request.turn_id, heard)
    return NotFound(f"turn {request.turn_id} does not exist", reason="TURN_NOT_FOUND")


def _lost_turn(turn_id: str, heard: int) -> DataLoss:
    return DataLoss(
        f"the client has output of turn {turn_id} up to {heard}, the ledger does not have the turn"
    )


def resume_index(output: TurnOutput, journalled: int, resume_from: Position | None) -> int:
    """Output tokens that the client has already, of ``journalled`` ones.

    Raises DataLoss if it has more than the ledger or another history, InvalidRequest if the
    position is before the turn's output.
    """
    if resume_from is None or resume_from == Position(0, b""):
        return 0
    count = resume_from.length - output.start.length
    if count < 0:
        raise InvalidRequest("resume_from lies before the turn's output")
    if count > journalled:
        raise DataLoss(
            f"the client has the ledger up to {resume_from.length}, the ledger ends at "
            f"{output.start.length + journalled}"
        )
    if resume_from.digest and resume_from.digest != output.digest_at(count):
        raise DataLoss(f"the ledger up to {resume_from.length} is not what the client was sent")
    return count


def fold(ports: TurnPorts, turn: Turn, start: RollingDigest, tokens: list[int]) -> TurnOutput:
    """The output of a stored turn, folded again from its journalled tokens."""
    plan = _plan(ports, turn)
    output = TurnOutput(start, plan.folder(ports.codec), plan.rules)
    for first in range(0, len(tokens), SEAL_EVERY):
        output.push(tokens[first : first + SEAL_EVERY])
        output.seal()
    return output


async def read_output(ports: TurnPorts, session: Session, turn: Turn, salt: bytes) -> TurnOutput:
    """An ended turn's output from the ledger, ready for replay. Needs no ownership."""
    end = turn.output_end.length
    tokens = await ports.store.read_tokens(session, 0, end)
    start = turn.output_start.length
    if len(tokens) != end:
        raise Unavailable(f"turn {turn.spec.turn_id}: the ledger changed while it was read")
    output = fold(ports, turn, RollingDigest.of(salt, tokens[:start]), tokens[start:])
    if output.start.digest != turn.output_start.digest:
        raise DataLoss(f"turn {turn.spec.turn_id}: the ledger does not match the turn's record")
    output.end()
    return output


class TurnOpening:
    """Opens one dispatched turn; used once."""

    def __init__(
        self,
        ports: TurnPorts,
        request: replica_pb2.DispatchTurnRequest,
        epoch: Epoch,
        traceparent: str = "",
    ) -> None:
        """``traceparent``: in which a new turn is accepted; stored with it."""
        self._ports = ports
        self._traceparent = traceparent
        self._request = request
        self._turn = request.turn
        self._epoch = epoch
        self._seed = ports.draw_seed()

    async def open(self, context: TurnContext, salt: bytes) -> Opened | Turn:
        """Begins the turn, or resumes it if it exists. An ended turn is returned as it is.

        Retries while the store does not answer, until the turn's deadline. Raises SessileErrors.
        """
        turn = context.turn
        timeout_ms = turn.spec.timeout_ms if turn else self._turn.timeout_ms
        give_up_at = anyio.current_time() + (timeout_ms or DEFAULT_TIMEOUT_MS) / 1000
        for _ in range(MAX_RACES):
            context = await self._restored(context, give_up_at)
            opened: Opened | Turn | None
            if context.turn is not None:
                opened = await self._resume(context, context.turn, salt, give_up_at)
            else:
                opened = await self._begin(context, salt, give_up_at)
            if opened is not None:
                return opened
            context = await self._look(give_up_at)
        raise Unavailable(f"session {self._turn.session_id} keeps changing; try again")

    async def _restored(self, context: TurnContext, give_up_at: float) -> TurnContext:
        """Checks that the session is open, ours and in our tokens (P14); if the store has forgotten
        what this epoch wrote and this replica still holds it, puts it back first."""
        session = context.session
        if session.state is not SessionState.OPEN:
            raise refusal(session.session_id, store.Refused(session.state))
        resident = self._ports.residency.get(session.session_id)
        ours = resident is not None and resident.epoch == self._epoch
        if ours and resident is not None and is_behind(session, context.turn, resident):
            held = broken_off(session, context.turn, resident)
            try:
                outcome = await repair(
                    self._ports.store,
                    resident,
                    self._ports.ref,
                    self._epoch,
                    held,
                    give_up_at,
                    token_fingerprint=self._ports.codec.token_fingerprint,
                )
            except DataLoss:
                # It is told once, and the session goes on from what the store has (I6).
                self._ports.residency.disown(session.session_id, self._epoch)
                raise
            if isinstance(outcome, store.Fenced | store.Refused | store.Missing):
                raise refusal(session.session_id, outcome)
            self._ports.residency.doubt()
            self._ports.metrics.repaired()
            if isinstance(outcome, store.TurnEnded) and outcome.turn.output_end != resident.head:
                # The store went on from what it had: what this replica holds is another history.
                raise NotOwner(
                    f"session {session.session_id}: turn {outcome.turn.spec.turn_id} ended "
                    "otherwise after the store lost writes"
                )
            context = await self._look(give_up_at)
            written = outcome.head.length if isinstance(outcome, store.Appended) else 0
            if context.session.head.length < written:
                return await self._restored(context, give_up_at)  # it was lost once more
            return context
        owner = session.owner
        if owner is None or owner.replica != self._ports.ref or owner.epoch != self._epoch:
            raise NotOwner(f"session {session.session_id} is not owned under this epoch")
        needed = session.token_fingerprint
        if needed and needed != self._ports.codec.token_fingerprint:
            raise NotOwner(f"session {session.session_id} needs another tokenizer or template")
        return context

    # -- a new turn -----------------------------------------------------------------------------

    async def _begin(
        self, context: TurnContext, salt: bytes, give_up_at: float
    ) -> Opened | Turn | None:
        """None: the session changed meanwhile; look again."""
        if self._turn.attach_only:
            raise missing_turn(self._turn)
        session = context.session
        known = self._turn.precondition.turn_index
        if session.active_turn_id is not None and known <= session.turn_index:
            raise refusal(session.session_id, store.Refused(session.state, session.active_turn_id))
        # Who knows of more ended turns saw the active one end: its end is lost (P1).
        if self._turn.HasField("precondition"):
            check_precondition(self._turn.precondition, session)
        resident = await self._ports.residency.load(
            self._ports.store, session, salt, context.ledger
        )
        if not self._turn.messages:
            self._check_nothing_heard(resident.head)  # who goes on with a turn may leave them out
        tokens = await self._render(session, resident)
        state = resident.digest.copy()
        state.update(tokens)
        self._check_nothing_heard(state.position())
        preamble = preamble_of(session.preamble)
        spec = resolve(
            self._turn,
            preamble.default_params,
            salt=salt,
            output_start=state.position().length,
            info=self._ports.engine.info,
            seed=self._seed,
            fork=session.parent_id is not None,
            traceparent=self._traceparent,
        )
        began_at = anyio.current_time()
        outcome = await until_answered(
            lambda: self._ports.store.begin_turn(
                session.session_id,
                self._epoch,
                session.head,
                spec,
                tokens,
                state.position(),
                token_fingerprint=self._ports.codec.token_fingerprint,
            ),
            give_up_at,
        )
        match outcome:
            case store.TurnBegun(turn=turn):
                resident.own(self._epoch, session.turn_index)
                resident.extend(tokens)
                if turn.output_end.length > len(resident.tokens):
                    return None  # an earlier call of ours began it; take it up as a resume
                self._ports.metrics.appended(len(tokens))
                begun_ms = turn.deadline_at_ms - spec.timeout_ms
                self._ports.tracing.gap(
                    session.session_id, "tool gap", session.turn_ended_at_ms, begun_ms
                )
                await self._note_leading(session, tokens)
                output = fold(self._ports, turn, state, [])
                plan = _plan(self._ports, turn)
                deadline = began_at + spec.timeout_ms / 1000
                return Opened(turn, resident, plan, output, deadline, began=True)
            case store.TurnExists() | store.HeadMismatch():
                return None
            case store.TurnConflict():
                raise TurnConflict(f"turn {spec.turn_id} exists with other input")
            case store.TurnInProgress(active_turn_id=other):
                if any(ended.spec.turn_id == other for ended in resident.recent):
                    return None  # it ended here, and the store has just forgotten that
                raise TurnInProgress(f"turn {other} is running", metadata={"turn_id": other})
            case store.TurnTombstoned():
                raise TurnCancelled(f"turn {spec.turn_id} was cancelled before it began")
            case _:
                if isinstance(outcome, store.Fenced):
                    self._ports.metrics.fenced("begin")
                raise refusal(session.session_id, outcome)

    def _check_nothing_heard(self, start: Position) -> None:
        """Raises DataLoss for a client that has output of the turn that is to begin at ``start``:
        the store has lost the turn (P1)."""
        heard = self._turn.resume_from
        if heard.length and (heard.length, heard.digest or start.digest) != (
            start.length,
            start.digest,
        ):
            raise _lost_turn(self._turn.turn_id, heard.length)

    async def _render(self, session: Session, resident: ResidentSession) -> list[int]:
        """The turn's input tokens. Raises InvalidRequest for what the template cannot render."""
        messages = chat_messages(self._turn.messages)
        preamble = preamble_of(session.preamble)
        if not messages and (resident.tokens or not preamble.messages):
            raise InvalidRequest("a new turn needs at least one message")
        last = LastTurn.NONE
        if resident.tokens:
            closed = resident.tokens[-1] in self._ports.codec.eos_token_ids
            last = LastTurn.CLOSED if closed else LastTurn.OPEN
        else:
            messages = chat_messages(preamble.messages) + messages
        try:
            return await self._ports.render(last, messages, chat_tools(preamble.tools))
        except BadMessages as error:
            raise InvalidRequest(str(error)) from error

    async def _note_leading(self, session: Session, tokens: list[int]) -> None:
        """Learns how many of a first turn's tokens are its session's leading messages."""
        preamble = preamble_of(session.preamble)
        if session.head.length or not preamble.messages:
            return
        if self._ports.residency.knows_leading(session.leading_digest):
            return  # rendering them once more would only delay the first token
        try:
            alone = await self._ports.render(
                LastTurn.NONE, chat_messages(preamble.messages), chat_tools(preamble.tools)
            )
        except BadMessages:
            return  # leading messages that do not stand alone are no prefix to place by
        shared = 0
        for mine, theirs in zip(alone, tokens, strict=False):
            if mine != theirs:
                break
            shared += 1
        resident = self._ports.residency.get(session.session_id)
        if resident is not None:
            self._ports.residency.note_leading(
                session.leading_digest, tokens[:shared], resident.salt
            )

    # -- a turn that exists ---------------------------------------------------------------------

    async def _resume(
        self, context: TurnContext, turn: Turn, salt: bytes, give_up_at: float
    ) -> Opened | Turn | None:
        if turn.status.ended:
            return turn
        check_input(self._turn, turn, salt)
        if self._turn.resume_from.length > turn.output_end.length:
            raise DataLoss(
                f"the client has the ledger up to {self._turn.resume_from.length}, the turn ends "
                f"at {turn.output_end.length}"
            )
        outcome = await until_answered(
            lambda: self._ports.store.resume_turn(
                self._turn.session_id, self._epoch, turn.spec.turn_id
            ),
            give_up_at,
        )
        match outcome:
            case store.TurnEnded(turn=ended):
                await self._keep_end(ended, context, salt)
                return ended
            case store.TurnUnknown():
                return None
            case store.TurnResumed(session=session, turn=resumed):
                if self._holds_beyond(session.head):
                    return None
                # The ledger may have grown between our look and the take-over.
            case _:
                if isinstance(outcome, store.Fenced):
                    self._ports.metrics.fenced("resume")
                raise refusal(self._turn.session_id, outcome)
        resident = await self._ports.residency.load(
            self._ports.store, session, salt, context.ledger
        )
        resident.own(self._epoch, session.turn_index)
        start = resumed.output_start.length
        tokens = resident.tokens
        digest = RollingDigest.of(salt, tokens[:start])
        if session.head != resumed.output_end:
            return None
        if digest.position() != resumed.output_start:
            raise DataLoss(f"turn {turn.spec.turn_id}: the ledger does not match the turn's record")
        output = fold(self._ports, resumed, digest, tokens[start:].tolist())
        if len(output.tokens) != len(tokens) - start:
            raise InternalError(f"turn {turn.spec.turn_id} has output after its end")
        # The store's clock at its last write of the session is the best we know of its time now.
        remaining_ms = min(turn.spec.timeout_ms, resumed.deadline_at_ms - session.updated_at_ms)
        deadline = anyio.current_time() + max(0, remaining_ms) / 1000
        plan = _plan(self._ports, resumed)
        return Opened(resumed, resident, plan, output, deadline, began=False)

    def _holds_beyond(self, end: Position) -> bool:
        """Whether we hold, as the owner, tokens behind where the store says that the ledger ends:
        it lost them after our look, and the next one has them put back (P1)."""
        held = self._ports.residency.get(self._turn.session_id)
        return held is not None and held.epoch == self._epoch and len(held.tokens) > end.length

    async def _keep_end(self, ended: Turn, context: TurnContext, salt: bytes) -> None:
        """Our own call ended it (its deadline, too many attempts): who hears of that relies on us
        to put the end back if the store loses it (P1)."""
        held = self._ports.residency.get(self._turn.session_id)
        later = held is not None and held.epoch > self._epoch
        if later or self._holds_beyond(ended.output_end):
            return
        resident = await self._ports.residency.load(
            self._ports.store,
            replace(context.session, head=ended.output_end),
            salt,
            context.ledger,
        )
        resident.own(self._epoch, ended.index)
        resident.ended(ended)

    async def _look(self, give_up_at: float) -> TurnContext:
        turn = self._turn
        return await read_context(self._ports, turn.session_id, turn.turn_id, give_up_at)


def _plan(ports: TurnPorts, turn: Turn) -> TurnPlan:
    return plan_of(
        body_of(turn.spec),
        output_start=turn.output_start.length,
        journalled=turn.output_end.length - turn.output_start.length,
        info=ports.engine.info,
        eos=ports.codec.eos_token_ids,
    )
