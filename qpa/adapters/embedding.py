"""LoRA on the embedding of the tokens.

An embedding is a linear layer whose input has a single 1, at the token's place, and which stores its weight
as [n_vocabulary, hidden]. PEFT keeps both factors as parameters, and not as modules with a weight.
"""

from __future__ import annotations

from qpa.documents.tensors import Role

EMBEDDING_A = Role("lora_embedding_A", "row", "uniform", of_embedding=True)
EMBEDDING_B = Role("lora_embedding_B", "column", is_scaled=True, of_embedding=True)
"""lora_embedding_A [rank, n_vocabulary] and lora_embedding_B [hidden, rank].

One number of each row of lora_embedding_A meets an input, so it is drawn from +-1, and not, as those of
lora_A are, from +-1/sqrt(in).
"""

ROLES = (EMBEDDING_A, EMBEDDING_B)
NAMES = tuple(role.name for role in ROLES)
