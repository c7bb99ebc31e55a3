"""The policy: what becomes of each request, the same on every node."""

from __future__ import annotations

from prism.policy.decision import AUTO, Action, Answer, Decision, Edits

__all__ = ["AUTO", "Action", "Answer", "Decision", "Edits"]
