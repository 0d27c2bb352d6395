"""Phi-3-vision and Phi-3.5-vision, composed from transformers' own CLIP and Phi3 classes.

Image features take the place of the `<|image|>` tokens in the input embeddings of a Phi3 language model. Shapes below:
B rows, N tokens, C crops over the whole batch, S pixels a crop side, T image tokens over the whole batch, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin
from transformers import initialization as init
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.phi3.modeling_phi3 import Phi3Model, Phi3PreTrainedModel, Phi3RotaryEmbedding
from transformers.utils import can_return_tuple

from .configuration_phi3_v import Phi3VConfig
from .image_processing_phi3_v import count_image_tokens

IGNORE_INDEX = -100
# attn_implementation: sdpa that attends the samples of a padding-free row one by one.
SDPA_PACKED = "sdpa_packed"


def sdpa_packed(module, query, key, value, attention_mask, sample_lengths: list[int] | None = None, **kwargs):
    """transformers' sdpa, (B, heads, N, head_dim) -> (B, N, heads, head_dim).

    With `sample_lengths` of the one row's samples each is attended by itself. transformers would make a mask of N x N
    instead, whose cost grows with the square of all samples together and which keeps the fast kernels from being used.
    """
    if sample_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    samples = zip(*(states.split(sample_lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in samples], dim=1), None


AttentionInterface.register(SDPA_PACKED, sdpa_packed)
AttentionMaskInterface.register(SDPA_PACKED, sdpa_mask)


def _keep_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor | None) -> torch.Tensor:
    """(B, N, hidden_size) -> the last `logits_to_keep` positions, all for 0 or None; or those at the indices of a 1-D tensor."""
    if isinstance(logits_to_keep, torch.Tensor):
        return hidden_states[:, logits_to_keep]
    return hidden_states[:, -(logits_to_keep or 0) :]


class Phi3VRotaryEmbedding(nn.Module):
    """Rotary position embedding whose long or short factors are chosen for each sequence by itself.

    transformers' own class chooses once for the whole batch, so that a long neighbour, or padding, would change the
    result of a short row. It also keeps its frequencies in buffers, which `model.bfloat16()` (DeepSpeed calls it)
    would round; here they are float32 always.
    """

    def __init__(self, config: Phi3VConfig):
        super().__init__()
        self.config = config
        self._frequencies: dict = {}

    def _inverse_frequencies(self, device) -> tuple[torch.Tensor, torch.Tensor, float]:
        if device not in self._frequencies:
            rope: Any = self.config.rope_parameters
            if rope["rope_type"] == "default":
                short, scaling = Phi3RotaryEmbedding.compute_default_rope_parameters(self.config, device)
                long = short
            else:
                longrope = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
                limit = self.config.original_max_position_embeddings
                short, scaling = longrope(self.config, device, seq_len=limit)
                long, _ = longrope(self.config, device, seq_len=limit + 1)
            self._frequencies[device] = short.float(), long.float(), scaling
        return self._frequencies[device]

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, (B, N, head_dim), in the dtype of `x`, for `position_ids` (B, N).

        A run of consecutive positions is one sequence: a row, one of several packed into a row, or the tokens that
        are added to a cache. It takes the long factors if its last position is past the original 4096.
        """
        short, long, scaling = self._inverse_frequencies(x.device)
        run = nn.functional.pad(position_ids.diff(dim=-1) != 1, (1, 0)).cumsum(-1)
        last = torch.zeros_like(position_ids).scatter_reduce(-1, run, position_ids, "amax").gather(-1, run)
        is_long = last >= self.config.original_max_position_embeddings
        angles = position_ids[..., None].float() * torch.where(is_long[..., None], long, short)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * scaling).to(x.dtype), (angles.sin() * scaling).to(x.dtype)


class Phi3VVisionTower(nn.Module):
    """Holds CLIP one level deeper: the official weights are named `vision_model.*`, a level that transformers 5 dropped."""

    def __init__(self, config: Phi3VConfig):
        super().__init__()
        self.vision_model = CLIPVisionModel(config.vision_config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patch features of the last layer but one, without the class token: (C, 3, S, S) -> (C, patches, width).

        The last layer and `post_layernorm` are never run: nothing reads them.
        """
        clip = self.vision_model
        hidden_states = clip.pre_layrnorm(clip.embeddings(pixel_values))
        for layer in clip.encoder.layers[:-1]:
            hidden_states = layer(hidden_states, attention_mask=None)
        return hidden_states[:, 1:]


class Phi3VImageEmbedding(nn.Module):
    """Crops -> image features in the language model's width."""

    def __init__(self, config: Phi3VConfig):
        super().__init__()
        self.crop_size = config.vision_config.image_size
        self.side = config.crop_tokens_per_side
        merged = 4 * config.vision_config.hidden_size
        self.img_processor = Phi3VVisionTower(config)
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, merged))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, merged))
        self.img_projection = nn.Sequential(
            nn.Linear(merged, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )

    def forward(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
        """Features of all images of a batch, one after the other.

        Args:
            pixel_values (torch.Tensor): normalised crops, floating point, (C, 3, S, S), for each image its global view
                and then its HD crops row by row; or (images, most crops, 3, S, S), padded, the official layout.
            image_sizes (torch.Tensor): height and width of each HD image in pixels, int, (images, 2).

        Returns:
            torch.Tensor: (T, hidden_size).

        Raises:
            TypeError: if the pixels are not floating point.
            ValueError: if shapes, sizes and number of crops do not fit each other.
        """
        images = self.split_images(pixel_values, image_sizes)
        if pixel_values.ndim == 5:
            pixel_values = torch.cat(images)
        # A frozen tower runs without autograd, whatever hooks (`enable_input_require_grads`) ask for.
        trained = any(parameter.requires_grad for parameter in self.img_processor.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            patches = self.img_processor(pixel_values)
        merged = self._merge(patches)
        maps = []
        crops_per_image = merged.split([len(crops) for crops in images])
        for crops, (height, width) in zip(crops_per_image, image_sizes.tolist(), strict=True):
            rows, columns = height // self.crop_size, width // self.crop_size
            maps += [self._assemble(crops[1:], rows, columns), self.glb_GN[0], self._assemble(crops[:1], 1, 1)]
        return self.img_projection(torch.cat(maps))

    def split_images(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> list[torch.Tensor]:
        """The real crops of each image, (1 + rows * columns, 3, S, S); arguments and errors as in `forward`."""
        size = self.crop_size
        if not pixel_values.is_floating_point():
            raise TypeError(
                f"pixel_values are {pixel_values.dtype}: expected floating point, normalised by Phi3VImageProcessor"
            )
        if pixel_values.ndim not in (4, 5) or tuple(pixel_values.shape[-3:]) != (3, size, size):
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}: expected (crops, 3, {size}, {size}) or "
                f"(images, crops, 3, {size}, {size}); crop_size of the image processor must be vision_config.image_size"
            )
        if image_sizes is None:
            raise ValueError("pixel_values without image_sizes: expected both, as Phi3VProcessor returns them")
        needed = []
        for height, width in image_sizes.tolist():
            if height % size or width % size or height < size or width < size:
                raise ValueError(
                    f"image_sizes has {height} x {width} pixels: expected multiples of the crop size {size}"
                )
            needed.append(1 + (height // size) * (width // size))
        if not needed:
            raise ValueError("image_sizes is empty: expected no pixel_values where there is no image")
        if pixel_values.ndim == 4:
            if sum(needed) != len(pixel_values):
                raise ValueError(
                    f"pixel_values hold {len(pixel_values)} crops: expected {sum(needed)} for the image_sizes"
                )
            return list(pixel_values.split(needed))
        if len(needed) != len(pixel_values) or max(needed) > pixel_values.shape[1]:
            raise ValueError(
                f"pixel_values hold {len(pixel_values)} images of {pixel_values.shape[1]} crops: expected {len(needed)} "
                f"images of at least {max(needed)} crops for the image_sizes"
            )
        return [crops[:count] for crops, count in zip(pixel_values, needed, strict=True)]

    def images_per_row(self, is_image: torch.Tensor, image_sizes: torch.Tensor) -> list[int]:
        """Number of images of each row of a batch, by the image tokens that `is_image` (B, N) marks in it.

        Raises:
            ValueError: if the tokens of a row are not those of its next images.
        """
        tokens = [
            count_image_tokens(height, width, self.crop_size, self.side) for height, width in image_sizes.tolist()
        ]
        counts, image = [], 0
        wanted_by_row = is_image.sum(-1).tolist()
        for row, wanted in enumerate(wanted_by_row):
            first, found = image, 0
            while image < len(tokens) and (found < wanted or row == len(wanted_by_row) - 1):
                found, image = found + tokens[image], image + 1
            if found != wanted:
                raise ValueError(
                    f"row {row} of input_ids holds {wanted} <|image|> tokens, its images give {found} features: expected "
                    "the same number; num_crops, image_sizes and the order of the images must be those that the processor "
                    "used for input_ids, and the prompt must be read in one piece, without prefill_chunk_size"
                )
            counts.append(image - first)
        return counts

    def _merge(self, patches: torch.Tensor) -> torch.Tensor:
        """Puts 2 x 2 neighbouring patches side by side: (C, 4 * side**2, width) -> (C, side, side, 4 * width)."""
        crops, _, width = patches.shape
        patches = patches.reshape(crops, self.side, 2, self.side, 2, width)
        return patches.transpose(2, 3).reshape(crops, self.side, self.side, 4 * width)

    def _assemble(self, crops: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """One map of all crops, each of its rows ended by `sub_GN`: -> (rows * side * (columns * side + 1), 4 * width)."""
        merged = crops.shape[-1]
        grid = crops.reshape(rows, columns, self.side, self.side, merged).transpose(1, 2)
        grid = grid.reshape(rows * self.side, columns * self.side, merged)
        ends = self.sub_GN[0].expand(rows * self.side, 1, merged)
        return torch.cat((grid, ends), dim=1).flatten(0, 1)


class Phi3VPreTrainedModel(Phi3PreTrainedModel):
    config: Phi3VConfig
    config_class = Phi3VConfig
    input_modalities = ["image", "text"]
    _no_split_modules = ["Phi3DecoderLayer", "CLIPEncoderLayer", "CLIPVisionEmbeddings"]
    # An alias of embed_tokens in the official state_dict(); its checkpoint does not hold it.
    _keys_to_ignore_on_load_unexpected = [r"vision_embed_tokens\.wte\.weight"]

    def __setattr__(self, name, value):
        """Unties head and embedding before PEFT puts an adapter on one of them.

        PEFT merges an adapter into the weight in place, and so into both where it is shared: only one of them was adapted.
        """
        adapted = name in ("lm_head", "embed_tokens") and "base_layer" in value._modules
        if adapted and self.config.tie_word_embeddings:
            weight = value.base_layer.weight
            value.base_layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            self.config.tie_word_embeddings = False
        super().__setattr__(name, value)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Phi3VImageEmbedding):
            init.normal_(module.glb_GN, std=self.config.initializer_range)
            init.normal_(module.sub_GN, std=self.config.initializer_range)


class Phi3VModel(Phi3VPreTrainedModel, Phi3Model):
    """Phi3Model that puts image features in the place of the `<|image|>` tokens."""

    def __init__(self, config: Phi3VConfig):
        super().__init__(config)
        self.rotary_emb = Phi3VRotaryEmbedding(config)  # type: ignore[assignment]
        self.vision_embed_tokens = Phi3VImageEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """See [`Phi3VForCausalLM.forward`]; returns last_hidden_state of shape (B, N, hidden_size)."""
        if inputs_embeds is not None and pixel_values is not None:
            raise ValueError(
                "inputs_embeds and pixel_values: expected one of them; put the features of `vision_embed_tokens` in the place "
                "of the <|image|> tokens yourself, or give input_ids"
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
            if pixel_values is not None:
                inputs_embeds = self._place_images(input_ids, inputs_embeds, pixel_values, image_sizes)
            elif input_ids is not None and input_ids.shape[1] > 1 and (input_ids == self.config.image_token_id).any():
                raise ValueError(
                    "input_ids hold <|image|> tokens without pixel_values: expected both, as the processor returns them"
                )
            elif self._others_wait_for_vision(past_key_values):
                inputs_embeds = inputs_embeds + 0 * self._blank_image_feature(inputs_embeds)
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            # By the mask, not by the place in the row: padding must not count.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        if self.config._attn_implementation == SDPA_PACKED and kwargs.get("cu_seq_lens_q") is not None:
            # Once for all layers: on a GPU it waits for the bounds. The empty mask keeps transformers from making one.
            kwargs["sample_lengths"] = kwargs["cu_seq_lens_q"].diff().tolist()
            attention_mask = inputs_embeds.new_empty(0, 0, 0, 0)
        elif attention_mask is not None and self.config._attn_implementation in ("sdpa", SDPA_PACKED):
            attention_mask = self._mask_without_empty_rows(inputs_embeds, attention_mask, past_key_values, position_ids)
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _mask_without_empty_rows(self, inputs_embeds, attention_mask, past_key_values, position_ids) -> torch.Tensor:
        """transformers' own mask, bool, (B, 1, N, keys), in which a position that sees no key sees all of them.

        Only padding on the left has such rows; what comes out of them is never used. But softmax over nothing is nan in some
        kernels, or in their backward pass, and 0 * nan reaches the weights.
        """
        mask: Any = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if mask is None or mask.dtype != torch.bool:  # the causal kernel does without; or the caller's own, to be added
            return attention_mask
        return mask | ~mask.any(-1, keepdim=True)

    def _place_images(self, input_ids, inputs_embeds, pixel_values, image_sizes) -> torch.Tensor:
        features = self.vision_embed_tokens(pixel_values, image_sizes)
        is_image = input_ids == self.config.image_token_id
        self.vision_embed_tokens.images_per_row(is_image, image_sizes)
        return inputs_embeds.masked_scatter(is_image[..., None], features.to(inputs_embeds.dtype))

    def _others_wait_for_vision(self, past_key_values) -> bool:
        """Whether the vision part must run without any image in the batch, because other ranks may have one in theirs.

        They would wait for its gradients, or, under ZeRO-3, for this rank's share of its weights, frozen or not.
        """
        if is_deepspeed_zero3_enabled():
            return not (past_key_values is not None and past_key_values.get_seq_length())
        return self.training and any(p.requires_grad for p in self.vision_embed_tokens.parameters())

    def _blank_image_feature(self, inputs_embeds) -> torch.Tensor:
        size = self.vision_embed_tokens.crop_size
        pixels = inputs_embeds.new_zeros(2, 3, size, size)
        return self.vision_embed_tokens(pixels, torch.tensor([[size, size]])).mean(0)


class Phi3VForCausalLM(Phi3VPreTrainedModel, GenerationMixin):
    """Phi-3-vision with its language-modelling head; loads and saves the official weights under their official names."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    # `num_items_in_batch` is honoured: the Trainer may normalise the loss over the whole effective batch.
    accepts_loss_kwargs = True

    def __init__(self, config: Phi3VConfig):
        super().__init__(config)
        self.model = Phi3VModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self._set_stop_tokens()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._set_stop_tokens()
        return loaded

    def _set_stop_tokens(self):
        # The official generation_config.json stops at `</s>` only, which the model never writes.
        self.generation_config.eos_token_id = self.config.stop_token_ids
        self.generation_config.pad_token_id = self.config.pad_token_id
        # No image stands behind an `<|image|>` that the model would write itself.
        self.generation_config.suppress_tokens = [self.config.image_token_id]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        # Not label_smoothing: the Trainer takes every argument with "label" in its name for a column of labels.
        smoothing: float = 0.0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Runs the model.

        Args:
            input_ids (torch.LongTensor): (B, N), `<|image|>` (config.image_token_id) wherever an image feature goes.
            attention_mask (torch.Tensor, optional): (B, N), 1 for tokens and 0 for padding.
            position_ids (torch.LongTensor, optional): (B, N); by default counted over the mask. Several sequences packed
                into one row start again at 0 each; leave attention_mask out then.
            pixel_values (torch.FloatTensor, optional): (C, 3, S, S), the crops of all images in the order of their tags
                over the batch, or the official padded layout (images, most crops, 3, S, S).
            image_sizes (torch.LongTensor, optional): (images, 2), height and width of each HD image in pixels.
            labels (torch.LongTensor, optional): (B, N), the input_ids to learn, -100 elsewhere; shifted inside.
            logits_to_keep (int | torch.Tensor, optional): 0 for logits at all positions (the default without labels), n
                for the last n, a 1-D tensor for those positions. With labels and without this, logits are computed only
                where a label is, and not returned.
            num_items_in_batch (int | torch.Tensor, optional): number of labels in the whole effective batch; the loss is
                then the sum over this many instead of the mean.
            smoothing (float): label smoothing, share of the target that is spread evenly over the vocabulary, 0 to 1.

        Returns:
            CausalLMOutputWithPast: loss, float32, 0 if there is no label at all; logits (B, positions, V); the cache.

        Raises:
            ValueError: if image tokens, features, crops and sizes do not fit each other.
            TypeError: if pixel_values are not floating point.
        """
        packed = position_ids is not None and attention_mask is None and past_key_values is None
        if use_cache is None and (labels is not None or self.training or packed):
            # A cache is of no use in training, and with one transformers does not look for sequences packed in a row.
            use_cache = False
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            loss = self._loss(hidden_states, labels, num_items_in_batch, smoothing)
        if labels is None or logits_to_keep is not None:
            logits = self.lm_head(_keep_positions(hidden_states, logits_to_keep))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(self, hidden_states, labels, num_items_in_batch, smoothing: float = 0.0) -> torch.Tensor:
        targets = labels[:, 1:].to(hidden_states.device)
        is_target = targets != IGNORE_INDEX
        targets = targets[is_target]
        logits = self.lm_head(hidden_states[:, :-1][is_target]).float()  # (labels, V)
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        if num_items_in_batch is None:
            num_items_in_batch = max(1, len(targets))
        elif isinstance(num_items_in_batch, torch.Tensor):
            # 0 where none of a step's samples could be read.
            num_items_in_batch = num_items_in_batch.to(loss.device).clamp(min=1)
        return loss / num_items_in_batch

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        use_cache=True,
        **kwargs,
    ):
        cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        # Nothing is cached yet: images belong to this pass, although an assistant model's first is not called so.
        is_first_iteration = is_first_iteration or not cached
        new = next_sequence_length or input_ids.shape[1]
        if cached and self._crosses_long_rope(cached, new, attention_mask):
            known = input_ids.shape[1] >= cached + new or inputs_embeds is not None
            if not known or (new > 1 and not is_first_iteration):
                limit = self.config.original_max_position_embeddings
                raise ValueError(
                    f"{new} tokens at once take a text of {cached} tokens past {limit}, where other rope factors begin: expected "
                    "a text that is read in one piece and continued there token by token, without prefill_chunk_size, "
                    "assistant_model and prompt_lookup_num_tokens, and all its input_ids beside past_key_values"
                )
            # The cached keys were rotated by the short factors: start again without them.
            past_key_values, next_sequence_length, is_first_iteration = None, None, True
        if inputs_embeds is not None and past_key_values is None:
            # The prompt is known by its embeddings alone, the tokens written since by their ids.
            length = (kwargs["position_ids"] if attention_mask is None else attention_mask).shape[-1]
            written = input_ids[:, input_ids.shape[1] - (length - inputs_embeds.shape[1]) :]
            inputs_embeds = torch.cat((inputs_embeds, self.get_input_embeddings()(written)), dim=1)
            is_first_iteration = True
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )

    def _crosses_long_rope(self, cached: int, new: int, attention_mask) -> bool:
        """Whether a row with `cached` tokens, padding included, grows past the original 4096 with the `new` ones of this step."""
        limit = self.config.original_max_position_embeddings
        if cached + new <= limit:
            return False
        if attention_mask is None:
            return cached <= limit
        lengths = attention_mask.sum(-1)
        return bool(((lengths > limit) & (lengths - new <= limit)).any())

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """Repeats each row, with its own images, `expand_size` times (beams): pixel_values have no batch dimension."""
        pixel_values, image_sizes = kwargs.pop("pixel_values", None), kwargs.pop("image_sizes", None)
        if pixel_values is not None and expand_size > 1:
            embedding = self.model.vision_embed_tokens
            counts = embedding.images_per_row(input_ids == self.config.image_token_id, image_sizes)
            images = embedding.split_images(pixel_values, image_sizes)
            starts = [sum(counts[:row]) for row in range(len(counts))]
            rows = [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
            order = [image for row in rows for _ in range(expand_size) for image in row]
            pixel_values, image_sizes = torch.cat([images[image] for image in order]), image_sizes[order]
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if pixel_values is not None:
            kwargs |= {"pixel_values": pixel_values, "image_sizes": image_sizes}
        return input_ids, kwargs


__all__ = ["Phi3VForCausalLM", "Phi3VModel", "Phi3VPreTrainedModel"]
