"""Chooses who runs a model's passes, reads its prompts, generates and prefetches: by its kind, its pager and its routing."""

import logging

from actors.executor.decoder import Decoder, HostDecoder
from actors.executor.encoder_decoder import EncoderDecoderRunner
from actors.executor.encoder_prompts import Classifier, EncoderPrompts, encoder_passes
from actors.executor.engine import EngineLimits
from actors.executor.host_pager import HostPager
from actors.executor.lookahead import Lookahead
from actors.executor.model_loader import SlotModel
from actors.executor.packed_encoder import ClassifierRunner, SourcePass, has_encoder
from actors.executor.passes import Pass
from actors.executor.predicted_routing import PredictedRouting
from actors.executor.prefetcher import Prefetcher, QueueingPrefetcher, ThreadedPrefetcher
from actors.executor.prompts import HostPrompts, PromptReader
from actors.executor.runner import ModelRunner, RowInput
from common.architecture import find_experts_modules

Runner = ModelRunner | EncoderDecoderRunner | ClassifierRunner


def new_runner(slot_model: SlotModel, num_rows: int, max_tokens: int) -> Runner:
    """Of the kind that goes with the model. It has run a pass, which allocates its cache, or fails here rather than for a
    user.
    """
    if has_encoder(slot_model.model):
        runner = new_encoder_runner(slot_model, num_rows, max_tokens)
        runner.read([0], [(0,)], SourcePass([1]))
        return runner
    decoder_runner = ModelRunner(slot_model, num_rows + 1, max_tokens)
    decoder_runner.run([RowInput(0, 0, (0,))], Pass(1))
    return decoder_runner


def new_encoder_runner(
    slot_model: SlotModel, num_rows: int, max_tokens: int
) -> EncoderDecoderRunner | ClassifierRunner:
    """For a model that `has_encoder`."""
    if slot_model.model.can_generate():
        return EncoderDecoderRunner(slot_model, num_rows, max_tokens)
    return ClassifierRunner(slot_model)


def cache_bytes(runner: Runner) -> int:
    return 0 if isinstance(runner, ClassifierRunner) else runner.cache.num_bytes()


def new_passes(
    slot_model: SlotModel,
    runner: Runner,
    limits: EngineLimits,
    top_k: int,
    routing: PredictedRouting | None = None,
    next_gate: bool = True,
    logger: logging.Logger | None = None,
    lookahead: Lookahead | None = None,
) -> tuple[PromptReader, Decoder]:
    """How prompts are read and tokens generated: in passes that page by themselves, decode steps captured, where the
    device can page. Routing of a decoder by tables needs the host at every pass; so does, as yet, an encoder with a decoder.

    Args:
        runner: has run a pass, so that its cache is allocated.
        next_gate: prefetch what the next layer's router says a layer early, where the device pages by itself.
        lookahead: prefetches for decode steps where the host pages.
    """
    logger = logger or logging.getLogger(__name__)
    if not isinstance(runner, ModelRunner):
        return _encoder_passes(slot_model, runner, limits, top_k, routing, logger, lookahead)
    if isinstance(slot_model.pager, HostPager) or routing is not None:
        return HostPrompts(runner, routing, lookahead), HostDecoder(runner, routing, lookahead)
    from actors.executor.gpu.captured_pass import NotCapturableError
    from actors.executor.gpu.device_prompts import DevicePrompts
    from actors.executor.gpu.fused_model import FusedModel, fuses
    from actors.executor.gpu.graph_decoder import DecodeStep, GraphDecoder
    from actors.executor.gpu.library_step import LibraryStep
    from actors.executor.gpu.pager import DevicePager
    from actors.executor.gpu.slot_experts import kernels_fit

    assert isinstance(slot_model.pager, DevicePager)
    model, cache, clock = slot_model.model, runner.cache, slot_model.clock
    step: DecodeStep = LibraryStep(model, cache)
    prompts: PromptReader = HostPrompts(runner)
    if fuses(model):
        fused = FusedModel(model, cache, clock)
        step, prompts = fused.decode, DevicePrompts(slot_model, runner, fused.prefill, next_gate)
    elif all(map(kernels_fit, find_experts_modules(model).values())):
        prompts = DevicePrompts(slot_model, runner, None, next_gate)
    decoder = GraphDecoder(
        step,
        slot_model.pager,
        clock,
        limits.max_batch_size,
        runner.max_tokens,
        top_k,
        model.device,
        next_gate,
    )
    try:
        decoder.capture(logger)
    except NotCapturableError as error:
        logger.warning("The host drives decoding, without CUDA graphs and several times slower: %s", error)
        return HostPrompts(runner), HostDecoder(runner)
    if isinstance(prompts, DevicePrompts):
        # As many tokens as may need all experts, and so waves.
        prompts.warm_up(min(slot_model.pager.num_experts, runner.max_tokens))
    return prompts, decoder


def _encoder_passes(
    slot_model: SlotModel,
    runner: EncoderDecoderRunner | ClassifierRunner,
    limits: EngineLimits,
    top_k: int,
    routing: PredictedRouting | None,
    logger: logging.Logger,
    lookahead: Lookahead | None,
) -> tuple[PromptReader, Decoder]:
    if isinstance(slot_model.pager, HostPager):
        return encoder_passes(runner, limits.prefill_chunk_tokens, routing, lookahead)
    from actors.executor.gpu.device_sources import DeviceSources
    from actors.executor.gpu.slot_experts import kernels_fit

    kernels = all(map(kernels_fit, find_experts_modules(slot_model.model).values()))
    if isinstance(runner, ClassifierRunner) and kernels:
        sources = DeviceSources(slot_model, runner, limits.prefill_chunk_tokens, top_k, routing)
        sources.capture(logger)
        return sources, Classifier()
    logger.info(
        "The host drives this model's passes, without CUDA graphs: it generates, or has experts without kernels"
    )
    return encoder_passes(runner, limits.prefill_chunk_tokens, routing, lookahead)


def new_prefetcher(slot_model: SlotModel, prompts: PromptReader) -> Prefetcher:
    """Of the kind that goes with the way prompts are read."""
    pager, clock = slot_model.pager, slot_model.clock
    if isinstance(pager, HostPager):
        return ThreadedPrefetcher(pager, clock)
    if isinstance(prompts, (HostPrompts, EncoderPrompts)):
        return QueueingPrefetcher(pager, clock, for_next_pass=prompts.reads_whole)
    from actors.executor.gpu.device_prefetcher import DevicePrefetcher
    from actors.executor.gpu.pager import DevicePager

    assert isinstance(pager, DevicePager)
    return DevicePrefetcher(pager, clock, for_next_pass=prompts.reads_whole)
