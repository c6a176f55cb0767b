"""The configuration of a flow: TarFlow (arXiv 2412.06329) or STARFlow (arXiv 2506.06276)."""

from dataclasses import dataclass

from starflow2_jax.models import layers, rope
from starflow2_jax.models.layers import LayerConfig


@dataclass(frozen=True)
class FlowConfig:
    """Every option of the two published families."""

    side: int  #: rows (= columns) of the training grid; RoPE and learned positions refer to it
    channels: int  #: D, channels of one token
    width: int  #: C, width of the blocks
    #: Number of layers of each block from the data to the noise; 0 is an identity block
    layers: tuple[int, ...]
    deep_width: int | None = None  #: width of the deep block; None is `width`
    head_dim: int = 64  #: channels of an attention head
    heads: int | None = None  #: query heads; None is width / head_dim
    kv_heads: int | None = None  #: key and value heads; None is one for each query head
    #: How the first token, which has no predecessor, is predicted. `token`: from a trained start
    #: vector. `shift`: it passes unchanged. `prefix`: from the last text position (blocks without
    #: text use a start vector).
    start: str = "token"
    order: str = "R2L"  #: the odd (`R2L`) or the even (`L2R`) blocks read the tokens in reverse
    positions: str = "rope"  #: `rope` or `learned`
    #: Frequencies of rows and columns: `released` (powers of 10000) or `grid` (multiples of
    #: pi / side, see `rope.grid_frequencies`)
    rope_frequencies: str = "released"
    #: The position that keys carry: of the token that an input predicts (`next`), as the queries
    #: do, or of the input itself (`own`). With `start="shift"`, `next` leaves queries and keys both
    #: at the input, as in TarFlow.
    key_positions: str = "next"
    rope_pairs: str = "interleaved"  #: `interleaved` or `half` (see `layers.rotate`)
    scale: str = "softplus"  #: `softplus` or `exp` of the first half of the head's output
    soft_clip: float = 0.0  #: c of c tanh(v / c) on the head's output; 0 disables it
    final_norm: bool = False  #: whether an RMSNorm precedes the output head
    classes: int = 0  #: number of classes, 0 for none
    text_channels: int = 0  #: E, channels of the text features; 0 without text
    text_length: int = 0  #: L, text tokens; 0 without text
    text_blocks: str = "deep"  #: blocks that read the text, `deep` or `all`
    norm: str = "layer_norm"  #: `layer_norm` or `rms_norm`
    bias: bool = True  #: whether the linears of attention and MLP have a bias
    qk_norm: bool = False  #: whether queries and keys are normalized
    post_norm: bool = False  #: whether the outputs of attention and MLP are normalized
    gated_mlp: bool = False  #: see `LayerConfig.gated`
    mlp_ratio: int = 4  #: hidden channels of the MLP / width
    compute_dtype: str | None = None  #: dtype of matmuls; None is the dtype of the parameters
    remat: str = "none"  #: a name in `layers.REMAT`
    attention: str = "auto"  #: a name in `attention.KERNELS`

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        for field, allowed in (
            ("start", ("token", "shift", "prefix")),
            ("order", ("R2L", "L2R")),
            ("positions", ("rope", "learned")),
            ("rope_frequencies", ("released", "grid")),
            ("key_positions", ("next", "own")),
            ("scale", ("softplus", "exp")),
            ("text_blocks", ("deep", "all")),
            ("norm", ("layer_norm", "rms_norm")),
            ("remat", tuple(layers.REMAT)),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"model.{field}={getattr(self, field)!r} is not one of {allowed}")
        if not self.layers:
            raise ValueError("model.layers is empty: a flow has at least one block")
        if self.start == "prefix" and not self.text_channels:
            raise ValueError("model.start='prefix' needs text: model.text_channels is 0")
        if bool(self.text_channels) != bool(self.text_length):
            raise ValueError("model.text_channels and model.text_length are both 0 or both set")
        if self.positions == "learned":
            for field, default in (("rope_frequencies", "released"), ("key_positions", "next")):
                if getattr(self, field) != default:
                    raise ValueError(
                        f"model.{field}={getattr(self, field)!r} needs model.positions='rope', got "
                        "'learned'"
                    )
        pairs = (rope.THIRD_AXIS_PAIRS if self.text_length else 0) + 2
        if self.positions == "rope" and self.head_dim // 2 < pairs:
            raise ValueError(
                f"model.head_dim={self.head_dim} leaves no RoPE pairs for rows and columns; "
                f"at least {2 * pairs} is needed"
            )

    @property
    def tokens(self) -> int:
        """Number of tokens T of the training grid."""
        return self.side**2

    def block(self, index: int) -> "BlockConfig":
        """Return the config of block `index`; negative numbers count from the deep block."""
        index %= len(self.layers)
        deep = index == len(self.layers) - 1
        text = bool(self.text_channels) and (deep or self.text_blocks == "all")
        width = self.deep_width or self.width if deep else self.width
        try:
            layer = self._layer(width)
        except ValueError as error:
            raise ValueError(f"model.layers, block {index} of width {width}: {error}") from error
        return BlockConfig(
            flow=self,
            depth=self.layers[index],
            # The deep block of L2R reads in raster order if the number of blocks is even.
            reverse=bool(index % 2) if self.order == "R2L" else index % 2 == 0,
            text=text,
            start="token" if self.start == "prefix" and not text else self.start,
            layer=layer,
        )

    def _layer(self, width: int) -> LayerConfig:
        heads = width // self.head_dim if self.heads is None else self.heads
        return LayerConfig(
            width=width,
            heads=heads,
            kv_heads=self.kv_heads or heads,
            head_dim=self.head_dim,
            mlp_width=self.mlp_ratio * width,
            norm="layer_norm" if self.norm == "layer_norm" else "rms_norm_offset",
            norm_eps=1e-5 if self.norm == "layer_norm" else 1e-6,
            activation="gelu_tanh" if self.gated_mlp else "gelu",
            gated=self.gated_mlp,
            qkv_bias=self.bias,
            out_bias=self.bias,
            mlp_bias=self.bias,
            qk_norm=self.qk_norm,
            post_norm=self.post_norm,
            rope_pairs=self.rope_pairs,
            attention=self.attention,
        )


@dataclass(frozen=True)
class BlockConfig:
    """The configuration of one block: the options of its flow, and those that differ by block."""

    flow: FlowConfig
    depth: int  #: number of layers
    reverse: bool  #: whether the block reads the tokens in reverse
    text: bool  #: whether the block reads the text
    start: str  #: as `FlowConfig.start`
    layer: LayerConfig
