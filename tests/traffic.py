"""How many bytes do operators move? Counted from their schemas, on tensors without data, of any size."""

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Adds up what every operator reads (each tensor that it is handed) and writes (each that it returns).

    A view moves nothing. What an operator updates in place it reads and writes. largest: [bytes] of the
    largest tensor that one returned; names: of the operators.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.largest, self.names = 0, 0, list[str]()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        infos = [argument.alias_info for argument in operator._schema.arguments]
        if any(info is not None and not info.is_write for info in infos):
            return result
        made = sizes(result)
        self.bytes += sum(sizes((args, kwargs))) + sum(made)
        self.largest = max([self.largest, *made])
        self.names.append(str(operator))
        return result


def sizes(tree) -> list[int]:
    """[bytes] of each tensor."""
    return [x.numel() * x.element_size() for x in tree_leaves(tree) if isinstance(x, Tensor)]
