"""Many prompts: packed into batches, answered in order, and kept in a file so that nothing is computed twice."""

from lazyllm.mapping.replies import Reply
from lazyllm.mapping.run import PromptMap

__all__ = ["PromptMap", "Reply"]
