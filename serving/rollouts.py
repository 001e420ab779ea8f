"""What a session would show: frames computed ahead of it, or again, that the journal does not keep.

Noise is a function of (seed, step), so the frames of a rollout are those that the session shows when the same actions
are played, and asking twice gives the same answer. A rollout has a slot of its own on the device, as a player has.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

import numpy as np

from serving.pictures import encode_jpeg
from serving.protocol import Context, Problem, StepJob, Stepped
from serving.session import Sessions, new_session_id, pack_tokens
from serving.store import Session


class Rollouts:
    """Futures of sessions, a bounded number at once.

    Args:
        sessions: the gateway's sessions.
    """

    def __init__(self, sessions: Sessions) -> None:
        self.sessions, self.limits = sessions, sessions.limits
        self._turn = asyncio.Semaphore(self.limits.rollouts_at_once)
        self._asked = 0

    async def ahead(self, session: Session, step: int, actions_NT: Sequence[Sequence[int]]) -> list[list[bytes]]:
        """The frames (JPEG) that each row of actions leads to from a step of a session.

        Raises:
            Problem: 404 no such step, 422 an action that the world doesn't have or more frames than allowed, 429 too
                many are being computed, 503 no replica.
        """
        frames = sum(len(row) for row in actions_NT)
        if frames > self.limits.rollout_frames:
            raise Problem(
                422, "rollout-too-large", f"{frames} frames: at most {self.limits.rollout_frames} at once",
                limit=self.limits.rollout_frames,
            )  # fmt: skip
        for action in {action for row in actions_NT for action in row}:
            self.sessions.check(session, action)
        if self._asked and self._asked + frames > 2 * self.limits.rollout_frames:
            raise Problem(
                429, "too-many-rollouts", f"{self._asked} frames of other rollouts are being computed: try again soon",
                retry_after_s=2, limit=2 * self.limits.rollout_frames, position=self._asked,
            )  # fmt: skip
        self._asked += frames
        try:
            async with asyncio.TaskGroup() as group:
                rows = [group.create_task(self._row(session, step, row)) for row in actions_NT]
        except ExceptionGroup as failed:  # one refusal says it for all
            raise failed.exceptions[0] from failed
        finally:
            self._asked -= frames
        return [row.result() for row in rows]

    async def _row(self, session: Session, step: int, actions: Sequence[int]) -> list[bytes]:
        async with self._turn:
            context = self.sessions.context(session, step)
            return [encode_jpeg(done.frame_HWC) async for done in self._imagine(session, step, context, actions)]

    async def replay(self, session: Session, steps: int) -> int | None:
        """Computes the first steps again from the prompt alone and compares tokens with the journal.

        Returns:
            The first step that differs; None when all are equal.
        """
        rows = list(self.sessions.store.rows(session.id, session.start + 1, min(session.step, session.start + steps)))
        context = self.sessions.context(session, session.start)
        async with (
            self._turn,
            aclosing(self._imagine(session, session.start, context, [r.action for r in rows])) as again,
        ):
            for row in rows:
                if pack_tokens((await anext(again)).tokens_N) != row.tokens:
                    return row.step
        return None

    async def _imagine(
        self, session: Session, step: int, context: Context, actions: Sequence[int]
    ) -> AsyncGenerator[Stepped, None]:
        """Steps after `step`, in a slot that is given back at the end; one that was taken away meanwhile is rebuilt."""
        model, scratch = self.sessions.worlds[session.model], new_session_id()
        try:
            for n, action in enumerate(actions, step + 1):
                job = StepJob(session=scratch, seed=session.seed, step=n, action=action, title=session.title)
                done = None
                if n > step + 1:
                    done = await self.sessions.patiently(lambda job=job: model.step(job))
                if done is None:
                    rebuilt = replace(job, context=context)
                    done = await self.sessions.patiently(lambda job=rebuilt: model.step(job))
                if done is None:
                    raise Problem(503, "model-unavailable", "the replica dropped the session at once", retry_after_s=1)
                context = _grown(context, action, done)
                yield done
        finally:
            await model.forget(scratch)


def _grown(context: Context, action: int, done: Stepped) -> Context:
    """The context after a step: what it says rebuilds its state."""
    tokens_TN = np.concatenate((context.tokens_TN, np.asarray(done.tokens_N, context.tokens_TN.dtype)[None]))
    actions_T = np.append(context.actions_T, action)
    kept = done.context
    return Context(tokens_TN=tokens_TN[-kept:], actions_T=actions_T[len(actions_T) - (kept - 1) :])
