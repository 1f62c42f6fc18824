"""Statistics of a projection's inputs over all calibration tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod

from pruners.lazy import Bool, Float, Tensor, torch


def is_finite(tensor: Tensor) -> bool:
    """Whether none of its numbers is NaN or infinite; takes no memory, as `tensor.isfinite().all()` does."""
    return bool(finite(tensor))


def finite(tensor: Tensor) -> Bool[Tensor, ""]:
    """The same, not yet read off the device."""
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    lowest, highest = tensor.aminmax()  # which hand NaN on
    return lowest.isfinite() & highest.isfinite()


class Statistic(ABC):
    """What is kept of a projection's inputs; made with their width and device, fed batch by batch."""

    @abstractmethod
    def __init__(self, width: int, device: torch.device) -> None: ...

    @abstractmethod
    def add(self, x: Float[Tensor, "windows tokens inp"]) -> None: ...

    @abstractmethod
    def finite(self) -> bool: ...


def _sums_of_squares(x: Float[Tensor, "windows tokens inp"], spare: bool) -> Float[Tensor, "windows inp"]:
    """Over tokens, in float32 within a window; `x` may be written over where it is to `spare`.

    On a GPU, where memory traffic is what takes time, as the square of a norm: that reads x once and writes nothing.
    """
    if x.is_cuda:
        wide = torch.promote_types(x.dtype, torch.float32)
        return torch.linalg.vector_norm(x, dim=1, dtype=wide).double().square()
    spare, x = spare or x.dtype != torch.float32, x.float()
    return (x.square_() if spare else x.square()).sum(1).double()


class InputNorm(Statistic):
    """||x_i|| over all calibration tokens; `windows` counts the sequences.  Summed in float64 over windows."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum_of_squares = torch.zeros(width, dtype=torch.float64, device=device)
        self.windows = 0

    def add(self, x: Float[Tensor, "windows tokens inp"]) -> None:
        self.sum_of_squares += _sums_of_squares(x, spare=False).sum(0)
        self.windows += len(x)

    @property
    def norm(self) -> Float[Tensor, " inp"]:
        return self.sum_of_squares.sqrt().float()

    def finite(self) -> bool:
        return is_finite(self.sum_of_squares)


class Moments(Statistic):
    """Mean and spread of every channel over all calibration tokens; windows merge in float64 (Chan et al. 1979)."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.windows = self.tokens = 0
        self.mean, self.squares, self.running = torch.zeros(3, width, dtype=torch.float64, device=device)

    def add(self, x: Float[Tensor, "windows tokens inp"]) -> None:
        count, length, _ = x.shape
        x = x if x.is_cuda else x.float()
        means = x.mean(1, keepdim=True, dtype=torch.float32)
        squares = _sums_of_squares(x - means, spare=True)
        means = means.squeeze(1).double()
        number = torch.arange(self.windows + 1, self.windows + count + 1, device=x.device)[:, None]
        so_far = (self.mean * self.windows + means.cumsum(0)) / number
        self.running += ((squares + length * (means - so_far).square()) * (number - 1) / number).sum(0)
        self._merge(means.mean(0), (squares + length * (means - means.mean(0)).square()).sum(0), count, count * length)

    def _merge(self, mean: Tensor, squares: Tensor, windows: int, tokens: int) -> None:
        total = self.tokens + tokens
        self.squares += squares + (mean - self.mean).square() * (self.tokens * tokens / total)
        self.mean += (mean - self.mean) * (tokens / total)
        self.windows, self.tokens = self.windows + windows, total

    @property
    def variance(self) -> Float[Tensor, " inp"]:
        return self.squares / self.tokens

    @property
    def mean_square(self) -> Float[Tensor, " inp"]:
        return self.variance + self.mean.square()

    @property
    def released_fluctuation(self) -> Float[Tensor, " inp"]:
        """What FLAP's released code computes: 1/(N-1) sum_n (n-1)/n sum_t (x_nt - mean of windows 1..n)^2."""
        return self.running / max(self.windows - 1, 1)

    def finite(self) -> bool:
        return is_finite(self.squares)


class Hessian(Statistic):
    """H = 2/N sum_t x_t x_t^T over all calibration tokens of N windows, in float32 (SparseGPT, eq. 1).

    On CUDA inputs of 16 bits stay so: their products are exact in float32, in which tensor cores add up a window's and
    round towards zero, so that all of H is smaller by about 1e-5, a factor that changes nothing.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.windows = 0

    def add(self, x: Float[Tensor, "windows tokens inp"]) -> None:
        tile = -(-x.shape[-1] // 4)  # H is symmetric: what lies below the diagonal tiles is not computed
        short = x.is_cuda and x.element_size() == 2
        for window in x if short else x.float():  # one by one, so that the sum does not depend on the batch size
            for start in range(0, x.shape[-1], tile):
                rows = slice(start, start + tile)
                if short:
                    self.sum[rows, start:] += torch.mm(window[:, rows].T, window[:, start:], out_dtype=torch.float32)
                else:
                    self.sum[rows, start:].addmm_(window[:, rows].T, window[:, start:])
        self.windows += len(x)

    @property
    def matrix(self) -> Float[Tensor, "inp inp"]:
        return _symmetric(self.sum.clone()).mul_(2 / self.windows)

    def taken(self) -> Float[Tensor, "inp inp"]:
        """The same in the memory of the sum, which is used up by it: once."""
        if not len(self.sum):
            raise ValueError("This Hessian was already consumed; gather it again, or use its `matrix` instead.")
        matrix, self.sum = self.sum, self.sum.new_empty(0, 0)
        return _symmetric(matrix).mul_(2 / self.windows)

    def finite(self) -> bool:
        return is_finite(self.sum)


def _symmetric(matrix: Float[Tensor, "inp inp"]) -> Float[Tensor, "inp inp"]:
    """What stands above the diagonal also below it, in place and a strip at a time."""
    size = len(matrix)
    strip = max(1, -(-size // 8))
    for start in range(0, size, strip):
        here, below = slice(start, start + strip), slice(start + strip, size)
        corner = matrix[here, here]
        corner.copy_(corner.triu() + corner.triu(1).T)
        matrix[below, here] = matrix[here, below].T
    return matrix
