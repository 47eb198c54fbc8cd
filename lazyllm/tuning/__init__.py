"""From a target, speed or fidelity, to a schedule for one model on a user's own prompts."""

from lazyllm.extras import needed

needed("optuna", what="tuning", extra="tune")
