"""The two attention layers of arXiv 1906.05909: the replacement for a 3x3 convolution, and the attention stem.

Feature maps have the layout BCHW here; the attention functions use [B, N, H, W, D].
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from sasa_train.attention import attention_weights, local_attention_qkv, stem
from sasa_train.attention.cpu import describe_build
from sasa_train.attention.dispatch import Pair, check_options, check_stride, check_whole, describe_backend, pair
from sasa_train.attention.reference import Inputs, Window
from sasa_train.machine import is_amd
from sasa_train.models.stem_norm import can_normalise_picked, is_plain, normalise_picked

POSITIONS = ("relative", "absolute", "none")
INVERSE_SQRT = "inverse_sqrt"  # of head_dim
BLOCK_SIZE = 4  # side length of the attention stem's blocks and of its max pool
STEM_NUM_HEADS = 4
STEM_NUM_MIXTURES = 4  # not given in the paper; 4 is the smallest value that matches its FLOPs (docs/paper.md)
STEM_VALUES = ("mixture", "plain", "conv")


# On an Intel processor, MKL's matrix product takes 0.70 (7 x 7 maps) to 1.0 (28 x 28) times as long as oneDNN's
# convolution, forward and backward. At 56 x 56 the factor is 1.05, or 0.95 with three times as many output as input
# channels. On AMD's, it takes 0.92 times as long at 7 x 7, 1.01 to 1.03 times at 14 x 14 to 56 x 56, and 1.08 to 1.15
# times with 32 images of 8 x 8 to 32 x 32 (8 images unless said, float32, AVX-512, torch 2.14 and 2.15).
class PointwiseConv2d(nn.Conv2d):
    """1x1 convolution without bias. On a CPU, channels_last maps of few pixels use a matrix product.

    max_positions: the number of pixels of the largest such map; on AMD processors, at most 7 x 7.
    """

    def __init__(self, in_channels: int, out_channels: int, max_positions: float = 28 * 28):
        super().__init__(in_channels, out_channels, 1, bias=False)
        self.max_positions = min(max_positions, 7 * 7) if is_amd() else max_positions

    def forward(self, x: Tensor) -> Tensor:
        small = x.shape[2] * x.shape[3] <= self.max_positions
        if small and x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last):
            return nn.functional.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        return super().forward(x)


class LocalSelfAttention2d(nn.Module):
    """Self-attention over a K x K window around each position, a replacement for a K x K convolution (Eq. 3).

    Query, key and value projections are dense, have no bias and are split into heads. There is no output projection.
    With `stride=2`, attention runs at the input resolution, followed by a 2x2 average pool. Input and output are BCHW.

    Projections are initialised from N(0, 1/in_channels) and embeddings from N(0, 1/head_dim), as in Axial-DeepLab's
    code, since the paper specifies no initialisation. This is a safe choice when scores are not scaled.

    Args:
        in_channels, out_channels: numbers of channels; `out_channels` is divided among the heads.
        kernel_size: the window size, an odd number, or a pair (rows, columns).
        num_heads: must divide `out_channels`; with relative positions, head_dim must be even.
        stride: 1, or 2 to add the pool; half an odd size is rounded up, as in the shortcut's strided 1x1 convolution.
        position: "relative", "absolute" (a sinusoid added to the input of the query and key projections) or "none".
        content: whether the scores include q.k; if not, there is no key projection.
        border: "mask", "zero" or "shift", see `local_attention`.
        share_rel: whether all heads share one pair of relative embeddings instead of having one each.
        dilation: the distance between neighbouring keys of a window, or a pair (rows, columns).
        scale: a factor above 0 on the scores, relative terms included, or "inverse_sqrt", for `head_dim**-0.5`.
        null_key: whether each window has one more key, with score 0 and value 0, so that a head may attend to nothing.
        own_value: whether to add the value at the query's position, times a learned factor per channel (0 at first).
            Attention weights are positive; with it, a head may also subtract its window's mean.

    Raises:
        ValueError: the arguments are incompatible; in forward, a window of `border="shift"` does not fit into the map.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair = 7,
        num_heads: int = 8,
        stride: int = 1,
        position: str = "relative",
        content: bool = True,
        border: str = "mask",
        share_rel: bool = True,
        backend: str = "auto",
        dilation: Pair = 1,
        scale: float | str = 1.0,
        null_key: bool = False,
        own_value: bool = False,
    ):
        super().__init__()
        _check_keys(in_channels, out_channels, num_heads, position, content)
        head_dim = out_channels // num_heads
        factor = head_dim**-0.5 if scale == INVERSE_SQRT else cast(float, scale)
        check_options(kernel_size, content, border, backend, dilation, factor, null_key)
        check_stride(stride)
        self.num_heads, self.kernel_size, self.stride = num_heads, kernel_size, stride
        self.position, self.content, self.border, self.backend = position, content, border, backend
        self.dilation, self.scale, self.null_key = dilation, factor, null_key
        # A single convolution computes all projections: query, [key,] value, each dense with `out_channels` channels.
        self._num_projections = 3 if content else 2
        self.qkv = PointwiseConv2d(in_channels, self._num_projections * out_channels, math.inf)
        heads = () if share_rel else (num_heads,)
        shapes = tuple((*heads, rows, head_dim // 2) for rows in self._window().table_rows())
        self.rel_height, self.rel_width = _relative_embeddings(shapes if position == "relative" else None)
        self.own_value = nn.Parameter(torch.empty(out_channels)) if own_value else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.qkv.weight, std=self.qkv.in_channels**-0.5)
        _init_relative(self.rel_height, self.rel_width)
        if self.own_value is not None:
            nn.init.zeros_(self.own_value)

    def forward(self, x: Tensor) -> Tensor:
        rel = (self.rel_height, self.rel_width)
        options = {"stride": self.stride, "backend": self.backend, **self._options()}
        projections = self._projections(x)
        out = _merge_heads(local_attention_qkv(projections, *rel, **options))
        if self.own_value is None:
            return out
        value = _merge_heads(projections[-1])
        if self.stride == 2:
            value = nn.functional.avg_pool2d(value, 2, ceil_mode=True)
        return torch.addcmul(out, self.own_value[:, None, None].to(out.dtype), value)

    def attention_weights(self, x: Tensor) -> Tensor:
        """Return what `sasa_train.attention.attention_weights` does for `forward` before pooling, [B, N, H, W, K*K]."""
        query, *key, _ = self._projections(x)
        rel = (self.rel_height, self.rel_width)
        return attention_weights(query, key[0] if key else None, *rel, **self._options())

    def describe_backend(self, device: torch.device) -> str:
        """Name what computes the attention on a device, and its compiler; the current autocast sets the dtype."""
        dtype, head_dim = self.qkv.weight.dtype, self.qkv.out_channels // self._num_projections // self.num_heads
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        query = torch.empty(1, self.num_heads, 1, 1, head_dim, dtype=dtype, device=device)
        rel = (self.rel_height, self.rel_width)
        return describe_backend(self.backend, Inputs(query, query, query, *rel), self._window())

    def _window(self) -> Window:
        return Window(*pair(self.kernel_size), self.border, self.scale, self.null_key)

    def _options(self) -> dict[str, Any]:
        names = ("kernel_size", "content", "border", "dilation", "scale", "null_key")
        return {name: getattr(self, name) for name in names}

    def relative_scores(self, x: Tensor) -> Tensor | None:
        """Return q.r at each offset, averaged over images and queries, [N, K, K]; None without embeddings.

        With `border="shift"`, keys are up to K - 1 positions away, so there are 2K - 1 by 2K - 1 offsets.
        """
        return _mean_relative_scores(self._projections(x)[0], self.rel_height, self.rel_width)

    def _projections(self, x: Tensor) -> Tensor:
        """Return queries, keys (if the scores include content) and values of all heads, [3 or 2, B, N, H, W, D]."""
        _check_maps(x, self.qkv.in_channels)
        qkv = self.qkv(x)
        if self.position == "absolute":
            qkv = qkv + self._projected_sinusoid(x)
        # [B, C', H, W] -> [3 or 2, B, N, H, W, D], a strided view
        heads = qkv.unflatten(1, (-1, self.num_heads, qkv.shape[1] // self._num_projections // self.num_heads))
        return heads.permute(1, 0, 2, 4, 5, 3)

    def _projected_sinusoid(self, x: Tensor) -> Tensor:
        """Return the sinusoid's contribution to the projections, [1, C', H, W], which is zero for the values."""
        # The projection is linear and the sinusoid concatenates a row code and a column code, so each is projected
        # separately.
        num_reading = self.qkv.out_channels // self._num_projections * (self._num_projections - 1)
        halves = zip(self.qkv.weight[:num_reading, :, 0, 0].chunk(2, dim=1), x.shape[2:], strict=True)
        rows, cols = (half @ sinusoid(x.shape[1] // 2, side, x.device).to(half.dtype) for half, side in halves)
        projected = rows[:, :, None] + cols[:, None, :]
        return nn.functional.pad(projected, (0, 0, 0, 0, 0, self.qkv.out_channels - num_reading))[None]

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, num_heads={self.num_heads}, position={self.position}, "
            f"content={self.content}, border={self.border}, stride={self.stride}, dilation={self.dilation}, "
            f"scale={self.scale:g}, null_key={self.null_key}, own_value={self.own_value is not None}"
        )


class AttentionStem(nn.Module):
    """The paper's stem (section 3.2, Eq. 8-9): attention inside aligned 4x4 blocks, BN and a 4x4 max pool, no ReLU.

    A query attends only to keys and values of its own block. Values are a mixture whose weights depend on the position
    (a, b) inside the block: v_ab = sum_m p(a, b, m) W_V^m x_ab with
    p(a, b, m) = softmax_m((emb_row(a) + emb_col(b)) . nu_m), shared by the heads.

    The input is BCHW; the output is [B, out_channels, H/4, W/4], or [B, out_channels, H, W] with `pool=False`.

    Args:
        in_channels, out_channels: numbers of channels; `out_channels` is divided among the heads.
        values: "mixture" or, for the ablations of Table 7, "plain" (a single W_V) or "conv" (a 4x4 convolution).
        pool: whether to apply the 4x4 max pool; without it, the stem suits images of up to 64 pixels.
        num_heads, num_mixtures: by default 4 heads, as in the paper, and 4 mixtures (the paper does not give a number).
        relative: whether the scores include q.r.
        backend: "auto" uses the compiled kernel (sasa_train/attention/stem.py) if it can run (on a CPU, in float32, not
            with values="conv"), otherwise PyTorch; "cpu" requires the kernel; "reference" and "triton" use PyTorch.

    Raises:
        RuntimeError: backend="cpu" is requested but cannot run.
        ValueError: `out_channels` and `num_heads` are incompatible; in forward, H or W is not divisible by 4.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        values: str = "mixture",
        pool: bool = True,
        num_heads: int = STEM_NUM_HEADS,
        num_mixtures: int = STEM_NUM_MIXTURES,
        relative: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        position = "relative" if relative else "none"
        check_options(2 * BLOCK_SIZE - 1, True, "mask", backend)
        check_whole("num_mixtures", num_mixtures)
        _check_keys(in_channels, out_channels, num_heads, position, content=True)
        if values not in STEM_VALUES:
            raise ValueError(f"values={values!r} must be one of {', '.join(STEM_VALUES)}")
        self.num_heads, self.values, self.backend = num_heads, values, backend
        self.qk = nn.Conv2d(in_channels, 2 * out_channels, 1, bias=False)
        if values == "conv":
            self.value: nn.Module = nn.Sequential(
                nn.ZeroPad2d((1, 2, 1, 2)), nn.Conv2d(in_channels, out_channels, BLOCK_SIZE, bias=False)
            )
        else:
            num_mixtures = num_mixtures if values == "mixture" else 1
            # W_V^1 .. W_V^m are concatenated, so that sum_m p_m W_V^m x is one projection of (p_1 x, .., p_m x).
            self.value = nn.Conv2d(num_mixtures * in_channels, out_channels, 1, bias=False)
        if values == "mixture":
            self.emb_row = nn.Parameter(torch.empty(BLOCK_SIZE, out_channels))
            self.emb_col = nn.Parameter(torch.empty(BLOCK_SIZE, out_channels))
            self.nu = nn.Parameter(torch.empty(num_mixtures, out_channels))
        shape = (2 * BLOCK_SIZE - 1, out_channels // num_heads // 2)
        self.rel_height, self.rel_width = _relative_embeddings((shape, shape) if relative else None)
        self.bn = nn.BatchNorm2d(out_channels)
        self.pool = nn.MaxPool2d(BLOCK_SIZE) if pool else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        in_channels, out_channels = self.qk.in_channels, self.qk.out_channels // 2
        nn.init.normal_(self.qk.weight, std=in_channels**-0.5)
        # Each W_V^m is drawn from N(0, 1/in_channels); the fan-in of the 4x4 convolution includes its 16 positions.
        num_taps = BLOCK_SIZE**2 if self.values == "conv" else 1
        nn.init.normal_(next(self.value.parameters()), std=(in_channels * num_taps) ** -0.5)
        if self.values == "mixture":
            nn.init.normal_(self.emb_row)
            nn.init.normal_(self.emb_col)
            nn.init.normal_(self.nu, std=out_channels**-0.5)
        _init_relative(self.rel_height, self.rel_width)

    def forward(self, x: Tensor) -> Tensor:
        _check_maps(x, self.qk.in_channels)
        height, width = x.shape[2:]
        _check_sides(height, width)
        if self._runs_kernel(x):
            return self._forward_kernel(x)
        query, key = self._queries_and_keys(x)
        value = self._blocks(self.value(self._mix(x) if self.values == "mixture" else x))
        out = self._attend(query, key, value)
        return self.pool(self.bn(self._unblock(out, height, width)))

    def attention_weights(self, x: Tensor) -> Tensor:
        """Return the attention weights of `forward`, [B, N, blocks, 16 queries, 16 keys]; they sum to 1 over the keys.

        Blocks and positions inside a block are in row-major order. PyTorch computes the weights in float32 or float64.
        """
        _check_maps(x, self.qk.in_channels)
        _check_sides(*x.shape[2:])
        query, key = self._queries_and_keys(x)
        dtype = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            return self._attn_weights(query.to(dtype), key.to(dtype))

    def relative_scores(self, x: Tensor) -> Tensor | None:
        """Return q.r at each offset from -3 to 3, averaged over queries, [N, 7, 7]; None without embeddings."""
        return _mean_relative_scores(self._queries_and_keys(x)[0], self.rel_height, self.rel_width)

    def describe_backend(self, device: torch.device) -> str:
        """Name what computes the stem on a device under the current autocast, and its compiler."""
        image = torch.empty(1, self.qk.in_channels, BLOCK_SIZE, BLOCK_SIZE, device=device)
        return describe_build("attention_stem", image.shape[1]) if self._runs_kernel(image) else "PyTorch"

    def _queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, key = (self._blocks(half) for half in self.qk(x).chunk(2, dim=1))
        return query, key

    def _runs_kernel(self, x: Tensor) -> bool:
        if self.backend in ("reference", "triton") or x.device.type == "meta":
            return False
        if self.values == "conv" or not (is_plain(self.qk, nn.Conv2d) and is_plain(self.value, nn.Conv2d)):
            if self.backend == "cpu":
                raise RuntimeError("backend='cpu' cannot run: it takes values=mixture or plain without hooks")
            return False
        autocast, weight = torch.is_autocast_enabled("cpu"), self.qk.weight
        return stem.can_run(self.backend, x.device.type, x.dtype, x.shape[1], weight.dtype, autocast)

    def _forward_kernel(self, x: Tensor) -> Tensor:
        """Run the compiled kernel in float32. Under autocast, the result has autocast's dtype, as in `_attend`."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        with torch.autocast("cpu", enabled=False):
            mixture = self.mixture_weights() if self.values == "mixture" else x.new_ones(1, BLOCK_SIZE, BLOCK_SIZE)
            assert isinstance(self.value, nn.Conv2d)
            w_v = self.value.weight.flatten(1).unflatten(1, (len(mixture), -1))
            inputs = (x, self.qk.weight.flatten(1), w_v, mixture, self.rel_height, self.rel_width, self.num_heads)
            # Batch norm is an affine map, so the pool keeps the maximum of each block or, if the norm's weight is
            # negative, the minimum. The kernel selects this value and never writes the map at full resolution.
            if is_plain(self.pool, nn.MaxPool2d) and can_normalise_picked(self.bn):
                picked, mean, variance = stem.attention_stem_pooled(*inputs, self.bn.weight.detach().sign())
                count = x.shape[0] * x.shape[2] * x.shape[3]
                return normalise_picked(self.bn, picked, mean, variance, count).to(dtype)
            out = stem.attention_stem(*inputs).to(dtype)
        return self.pool(self.bn(out))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute full attention inside each block, [B, N, blocks, 16, D] (in float32 for half-precision inputs)."""
        if query.dtype in (torch.bfloat16, torch.float16):
            with torch.autocast(query.device.type, enabled=False):
                return self._attend(query.float(), key.float(), value.float()).to(value.dtype)
        return self._attn_weights(query, key) @ value

    def _attn_weights(self, query: Tensor, key: Tensor) -> Tensor:
        scores = query @ key.transpose(-1, -2)
        if self.rel_height is not None:
            scores = scores + torch.einsum("bnpid,ijd->bnpij", query, self._relative(query.dtype))
        return scores.softmax(-1)

    def mixture_weights(self) -> Tensor:
        """Return the mixture weights p(a, b, m) as [m, 4, 4]; they sum to 1 over m."""
        position = self.emb_row[:, None] + self.emb_col[None, :]
        return torch.einsum("abc,mc->mab", position, self.nu).softmax(0)

    def _mix(self, x: Tensor) -> Tensor:
        """Multiply each position of x [B, C, H, W] by its m mixture weights p(a, b, m); return [B, m*C, H, W]."""
        tiles = (1, x.shape[2] // BLOCK_SIZE, x.shape[3] // BLOCK_SIZE)
        weights = self.mixture_weights().to(x.dtype).repeat(tiles)
        return (weights[None, :, None] * x[:, None]).flatten(1, 2)

    def _relative(self, dtype: torch.dtype) -> Tensor:
        """Return r for each query and key of a block, [16, 16, D]; its halves are the row and the column embedding."""
        assert self.rel_height is not None and self.rel_width is not None
        place = torch.arange(BLOCK_SIZE, device=self.rel_height.device)
        offset = place[None, :] - place[:, None] + BLOCK_SIZE - 1  # [query, key]
        rows, cols = self.rel_height[offset], self.rel_width[offset]  # [4, 4, D/2]
        rows = rows[:, None, :, None].expand(*[BLOCK_SIZE] * 4, -1)
        cols = cols[None, :, None, :].expand(*[BLOCK_SIZE] * 4, -1)
        return torch.cat([rows, cols], dim=-1).flatten(2, 3).flatten(0, 1).to(dtype)

    def _blocks(self, x: Tensor) -> Tensor:
        """Split [B, C, H, W] into blocks, [B, N, number of blocks, 16, D]."""
        batch, channels, height, width = x.shape
        size = BLOCK_SIZE
        x = x.view(batch, self.num_heads, channels // self.num_heads, height // size, size, width // size, size)
        return x.permute(0, 1, 3, 5, 4, 6, 2).flatten(4, 5).flatten(2, 3)

    def _unblock(self, blocks: Tensor, height: int, width: int) -> Tensor:
        """Undo `_blocks`."""
        x = blocks.unflatten(3, (BLOCK_SIZE, BLOCK_SIZE)).unflatten(2, (height // BLOCK_SIZE, width // BLOCK_SIZE))
        return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(x.shape[0], x.shape[1] * x.shape[6], height, width)


def sinusoid(channels: int, length: int, device: torch.device | None = None) -> Tensor:
    """Return the Transformer's position encoding [channels, length], sines in the first half, cosines in the second."""
    frequencies = 10_000.0 ** -(torch.arange(0, channels, 2, device=device) / channels)
    angles = frequencies[:, None] * torch.arange(length, device=device)
    return torch.cat([angles.sin(), angles.cos()])


def _relative_embeddings(shapes: tuple[tuple[int, ...], ...] | None) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """Return the parameters `rel_height` and `rel_width` of shape [..., K, D/2], or (None, None)."""
    if shapes is None:
        return None, None
    return nn.Parameter(torch.empty(shapes[0])), nn.Parameter(torch.empty(shapes[1]))


def _init_relative(*embeddings: nn.Parameter | None) -> None:
    """Initialise an embedding from N(0, 1/head_dim)."""
    for embedding in embeddings:
        if embedding is not None:
            nn.init.normal_(embedding, std=(2 * embedding.shape[-1]) ** -0.5)


def _mean_relative_scores(query: Tensor, rel_height: Tensor | None, rel_width: Tensor | None) -> Tensor | None:
    """Return q.r at each offset, [N, K, K], averaged over all queries [B, N, ..., D]."""
    if rel_height is None or rel_width is None:
        return None
    # q.r is linear in q, so the mean query has the mean score.
    mean = query.transpose(0, 1).flatten(1, -2).to(torch.promote_types(query.dtype, torch.float32)).mean(1)  # [N, D]
    top, bottom = mean[:, None].chunk(2, dim=-1)
    rows, cols = (top * rel_height).sum(-1), (bottom * rel_width).sum(-1)  # [N, K] each
    return rows[:, :, None] + cols[:, None, :]


def _check_sides(height: int, width: int) -> None:
    if height % BLOCK_SIZE or width % BLOCK_SIZE:
        larger = [math.ceil(side / BLOCK_SIZE) * BLOCK_SIZE for side in (height, width)]
        raise ValueError(
            f"image of {height} x {width}: the attention stem needs sides that {BLOCK_SIZE} divides; "
            f"the next size is {larger[0]} x {larger[1]}, or choose a convolutional stem"
        )


def _check_maps(x: Tensor, in_channels: int) -> None:
    expected = f"x must be a floating tensor [B, {in_channels}, H, W] with sides of at least 1"
    if not isinstance(x, Tensor):
        raise ValueError(f"{expected}; got {type(x).__name__}")
    if x.dim() != 4 or x.shape[1] != in_channels or 0 in x.shape[2:] or not x.dtype.is_floating_point:
        raise ValueError(f"{expected}; got {x.dtype} {list(x.shape)}")


def _merge_heads(heads: Tensor) -> Tensor:
    """Return [B, N, H, W, D] as BCHW; a view if the memory is that of channels_last maps."""
    return heads.permute(0, 1, 4, 2, 3).flatten(1, 2)


def _check_keys(in_channels: int, channels: int, num_heads: int, position: str, content: bool) -> None:
    for name, value in (("in_channels", in_channels), ("out_channels", channels), ("num_heads", num_heads)):
        check_whole(name, value)
    if channels % num_heads:
        raise ValueError(f"num_heads={num_heads} must divide the layer's {channels} channels")
    if position == "relative" and channels // num_heads % 2:
        raise ValueError(
            f"num_heads={num_heads} leaves head_dim={channels // num_heads}; relative positions need it even"
        )
    if position not in POSITIONS:
        raise ValueError(f"position={position!r} must be one of {', '.join(POSITIONS)}")
    if position == "absolute" and in_channels % 4:
        raise ValueError(
            f"position='absolute' needs input channels that 4 divides (sine, cosine; row, column): {in_channels}"
        )
    if not content and position != "relative":
        raise ValueError(f"content=False with position={position!r} leaves no score; use position='relative'")
