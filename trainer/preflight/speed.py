"""Does a device multiply rightly, and as fast as the others and its sheet?"""

import time
from collections.abc import Callable, Sequence

import torch

from trainer.preflight.finding import Finding, least_of

KNOWN = 1024  # of the product whose every element is known
SIZE = {
    "cuda": 8192,
    "cpu": 256,
}  # of the one that is timed: a GPU takes a millisecond or two for it, a core one
REPEATS = {"cuda": 30, "cpu": 200}
SHARE = {
    "cuda": 0.85,
    "cpu": 0.5,
}  # of the middle device: GPUs of a kind differ by a few percent, cores by more
SHEET_SHARE = 0.7  # of what the sheet promises


def is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Sums of -1, 0 and 1 are the same in any order and, up to 256, in any dtype."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-1, 2, (KNOWN, KNOWN), generator=generator, dtype=torch.float64) for _ in range(2))
    product = a.to(device, dtype) @ b.to(device, dtype)
    return torch.equal(product.cpu().double(), a @ b)


def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """[FLOP/s] of the fastest of some products: on a busy host the others have waited for a core."""
    n = SIZE[device.type]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / fastest_s(lambda: torch.mm(a, b), device, repeats=REPEATS[device.type])


def fastest_s(action: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """[s] The first time does not count."""
    action()
    best_s = float("inf")
    for _ in range(repeats):
        finish(device)
        start_s = time.perf_counter()
        action()
        finish(device)
        best_s = min(best_s, time.perf_counter() - start_s)
    return best_s


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def slow(
    devices: Sequence[tuple[str, str]], flops: Sequence[float], *, kind: str, sheet: float | None
) -> list[Finding]:
    """devices: host and name of each; sheet [FLOP/s]: what a product reaches by configs/device."""
    promised = None if sheet is None else sheet * SHEET_SHARE / SHARE[kind]
    least = least_of(flops, share=SHARE[kind], sheet=promised)
    limit = f"{least / 1e12:.3g} TFLOP/s"
    return [
        Finding(
            host, f"{device}, a product of {SIZE[kind]} x {SIZE[kind]}", f"{value / 1e12:.3g} TFLOP/s", limit
        )
        for (host, device), value in zip(devices, flops, strict=True)
        if value < least
    ]


def wrong(devices: Sequence[tuple[str, str]], right: Sequence[bool]) -> list[Finding]:
    return [
        Finding(
            host, f"{device}, a known product of {KNOWN} x {KNOWN}", "another result", "equal in every bit"
        )
        for (host, device), is_so in zip(devices, right, strict=True)
        if not is_so
    ]
