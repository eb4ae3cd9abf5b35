"""Score a sample: tokenize it for every model, request all teachers at once, and prepare their rows.

All models receive the same text. A sample that exceeds the limit of one model is rejected, or shortened for all models.
"""

import math
import time
from dataclasses import dataclass

import numpy as np

from alignment import AlignmentError, Target
from alignment.report import AlignmentReport
from alignment.sampled_tokens import are_equal, num_noncanonical, transfer_target
from teachers.protocol.errors import TeacherError, TeacherLost
from teachers.protocol.rows import Rows
from trainer.chats.jinja_template import ChatError
from trainer.query.background import in_thread
from trainer.query.connect import ConnectedTeacher, TeacherConnection, gather
from trainer.records import Sample, ScoredSample, TeacherScores, TokenizedSample
from trainer.shortening import STUDENT_WINDOW, Excess, fit_sample
from trainer.signals.base import Prepared, TeacherSignal
from trainer.sources.config import DataConfig
from trainer.telemetry.collector import Collector, ResponseTime
from trainer.tokenization import SampleTokenizer, raise_unless_skipped, reads_sampled_tokens


@dataclass(frozen=True, eq=False)
class Tokenizations:
    """A sample within the limits of all models, as the student and every teacher tokenize it.

    canonical  a rollout as the student's tokenizer writes its text; None if these are the tokens that were sampled
    """

    sample: Sample
    student: TokenizedSample
    teachers: tuple[TokenizedSample, ...]
    canonical: TokenizedSample | None = None


class SampleScorer:
    """Scores samples for one student. Its coroutines run in the event loop of the connection."""

    def __init__(self, connection: TeacherConnection, student: SampleTokenizer, data: DataConfig) -> None:
        self._connection = connection
        self._student = student
        self._data = data

    async def score(self, sample: Sample, collector: Collector) -> ScoredSample | None:
        """Tokenize a sample and request every teacher. Return None for a chat that is skipped."""
        tokenizations = await self.tokenize(sample, collector)
        return None if tokenizations is None else await self.request(tokenizations, collector)

    async def tokenize(self, sample: Sample, collector: Collector) -> Tokenizations | None:
        """Tokenize a sample for every model, shortened to the limits of all. Return None for a skipped chat."""
        try:
            if sample.refusal is not None:
                raise sample.refusal
            tokenizations, seconds = await in_thread(self._tokenize, sample)
        except ChatError as error:
            if sample.rollout is None or not sample.is_chat:  # the user cannot correct a sampled answer
                raise_unless_skipped(error, self._data)
            collector.skipped, collector.skip_reason = collector.skipped + 1, str(error)
            return None
        collector.record("tokenize", seconds)
        collector.shortened += tokenizations.sample is not sample
        if tokenizations.canonical is not None:
            counts = num_noncanonical(tokenizations.canonical.tokens, tokenizations.student.tokens)
            collector.rollouts.noncanonical += counts
        rendered = tokenizations.student.rendered
        if rendered is not None:
            collector.folded_system += rendered.folded_system
            collector.omitted_reasoning += sum(each.kind == "reasoning" for each in rendered.omissions)
            collector.changed_content += sum(each.kind != "reasoning" for each in rendered.omissions)
        return tokenizations

    async def request(self, tokenizations: Tokenizations, collector: Collector) -> ScoredSample:
        """Request all teachers concurrently. The first error cancels the other requests.

        Raises TeacherLost if no teacher is available.
        """
        connection, sample = self._connection, tokenizations.sample
        requests = zip(connection.teachers, connection.signals, tokenizations.teachers, strict=True)
        scores = await gather(
            self._request_one(teacher, signal, (tokenizations, own), collector) for teacher, signal, own in requests
        )
        if scores and all(one.unavailable for one in scores):
            raise TeacherLost(f"every teacher is unavailable (sample {sample.name}): at least one is required")
        return ScoredSample(sample, tokenizations.student, tuple(scores))

    def _tokenize(self, original: Sample) -> Tokenizations:
        def attempt(sample: Sample) -> tuple[Tokenizations, Excess | None]:
            student = self._student.tokenize(sample)
            teachers = tuple(teacher.tokenizer.tokenize(sample) for teacher in self._connection.teachers)
            tokenizations = Tokenizations(sample, student, teachers, self._canonical(sample, student))
            return tokenizations, self._first_excess(sample, student, teachers)

        return fit_sample(original, attempt, self._data)

    def _canonical(self, sample: Sample, student: TokenizedSample) -> TokenizedSample | None:
        vocabularies = [teacher.tokenizer.vocabulary for teacher in self._connection.teachers]
        if sample.rollout is None or all(reads_sampled_tokens(sample, each) for each in vocabularies):
            return None
        canonical = self._student.tokenize_canonical(sample)
        return None if are_equal(canonical.tokens, student.tokens) else canonical

    def _first_excess(
        self, sample: Sample, student: TokenizedSample, teachers: tuple[TokenizedSample, ...]
    ) -> Excess | None:
        """Return the first tokenization that exceeds the limit of its model, or None."""
        for teacher, tokenized in zip(self._connection.teachers, teachers, strict=True):
            limit = teacher.card.max_tokens - len(teacher.card.prefix)
            if len(tokenized) > limit:
                return Excess(tokenized, limit, f"teacher {teacher.config.name}")
        limit = self._data.window_tokens + sample.closes
        return Excess(student, limit, STUDENT_WINDOW) if len(student) > limit else None

    async def _request_one(
        self,
        teacher: ConnectedTeacher,
        signal: TeacherSignal,
        tokenized: tuple[Tokenizations, TokenizedSample],
        collector: Collector,
    ) -> TeacherScores:
        (tokenizations, own), name = tokenized, teacher.config.name
        sample, telemetry = tokenizations.sample, collector.teacher(name)
        sequence = [*teacher.card.prefix, *own.tokens.ids.tolist()]
        if len(sequence) < 2:  # a single token without BOS in front: there is no position to predict
            return _no_scores(own, tokenizations.student, telemetry=collector, name=name)
        start, requested_at = _first_position(teacher, own), time.monotonic()
        try:
            rows = await self._connection.pool.score(name, sequence, start, teacher.config.top_k, sample.name)
        except TeacherLost:  # logged by the pool
            telemetry.unavailable += 1
            return _no_scores(own, tokenizations.student, telemetry=collector, name=name, unavailable=True)
        except TeacherError as error:
            error.args = (f"{error} (sample {sample.name})",)
            raise
        collector.respond(ResponseTime(name, requested_at, time.monotonic()))
        telemetry.masked += rows.num_masked
        first_row = rows.start - len(teacher.card.prefix)
        try:
            prepared, seconds = await in_thread(_prepare, signal, (rows, first_row, own), tokenizations, teacher)
        except AlignmentError as error:
            raise AlignmentError(f"teacher {name}, sample {sample.name}: {error}") from error
        collector.record("align", seconds)
        telemetry.report += prepared.report
        telemetry.unaligned.update(prepared.unaligned)
        scores = TeacherScores(
            own, first_row, _copy(rows), prepared.nats_per_token, prepared.target, prepared.auxiliary
        )
        if sample.rollout is not None:
            nats, num_bytes = scores.supervised_text
            telemetry.rollout_nats += nats
            telemetry.rollout_bytes += num_bytes
        return scores


def _copy(rows: Rows) -> np.ndarray:
    """Return the actual tokens' log-probabilities without keeping the response's buffer alive."""
    return rows.actual.copy()


def _prepare(
    signal: TeacherSignal,
    response: tuple[Rows, int, TokenizedSample],
    tokenizations: Tokenizations,
    teacher: ConnectedTeacher,
) -> Prepared:
    """Prepare the rows of one response: rows, first row, and the teacher's tokens.

    A teacher that has not received the sampled tokens does not know how the student writes a rollout. Its rows are
    aligned to the canonical tokens, and the target is moved to the sampled ones.
    """
    canonical, student = tokenizations.canonical, tokenizations.student
    if canonical is None or reads_sampled_tokens(tokenizations.sample, teacher.tokenizer.vocabulary):
        return signal.prepare(*response, student)
    prepared = signal.prepare(*response, canonical)
    return prepared._replace(target=transfer_target(prepared.target, canonical.tokens, student.tokens))


def _first_position(teacher: ConnectedTeacher, tokenized: TokenizedSample) -> int:
    """Return the first position of the teacher's sequence to score, at least 1.

    For a text it is the position of its first token, for a chat that of the first supervised token.
    """
    first = 0 if tokenized.rendered is None else int(tokenized.supervised_T.argmax())
    return max(len(teacher.card.prefix) + first, 1)


def _no_scores(
    own: TokenizedSample, student: TokenizedSample, *, telemetry: Collector, name: str, unavailable: bool = False
) -> TeacherScores:
    """Return scores that have no valid position."""
    telemetry.teacher(name).report += AlignmentReport(positions=len(student))
    no_rows = np.zeros(0, dtype=np.float32)
    return TeacherScores(own, 0, no_rows, math.inf, Target.empty(len(student)), unavailable=unavailable)
