"""Which parts of a model may be trained alone, and what are they made of?

Every parameter of the model is of exactly one of the parts in ATOMS; the other names stand for several.
"""

from collections.abc import Sequence

SIDES = ("global", "local")  # layers with full attention, and with a window
KINDS = ("attention", "norms", "ffn", "router", "experts")  # of a layer
ATOMS = ("embedding", "final_norm", "head", *(f"{side}_{kind}" for side in SIDES for kind in KINDS))
PARTS = (
    {atom: frozenset([atom]) for atom in ATOMS}
    | {kind: frozenset(f"{side}_{kind}" for side in SIDES) for kind in KINDS}
    | {f"{side}_layers": frozenset(f"{side}_{kind}" for kind in KINDS) for side in SIDES}
)


def atoms_of(names: Sequence[str] | None) -> frozenset[str]:
    """None: of the whole model."""
    return frozenset(ATOMS) if names is None else frozenset[str]().union(*(PARTS[name] for name in names))
