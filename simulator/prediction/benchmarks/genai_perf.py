"""Read exports of genai-perf and of its successor AIPerf: ``profile_export_genai_perf.json``,
``profile_export_aiperf.json``.

Writers: ``genai-perf/genai_perf/export_data/json_exporter.py`` of
https://github.com/triton-inference-server/perf_analyzer, commits 4cc7650 (``input_config`` has the arguments) and
0f5cc07 (it has sections); ``src/aiperf/exporters/metrics_json_exporter.py`` and ``common/models/export_models.py`` of
https://github.com/ai-dynamo/aiperf, commit 047d59d (schema 1.3; an export of 0.8.0 is in its tests).
"""

from __future__ import annotations

from typing import Any

from simulator.arguments import shown
from simulator.errors import InputError, one_line
from simulator.prediction.benchmarks.run import ENOUGH_ROUNDS, BenchRun, Fields, check_closed_loop, check_failed


def profile_export(fields: Fields) -> BenchRun:
    """Return an export of ``genai-perf profile --concurrency C`` or ``aiperf profile --concurrency C``, over HTTP.

    Metrics are averages over requests, with their unit. By Little's law, the mean time of a request is C per
    ``request_throughput``. ``time_to_first_token`` exists with ``--streaming``; ``inter_token_latency`` is the rest of
    the request per further token, a TPOT. ``output_sequence_length`` counts all output tokens.
    """
    tool = "AIPerf" if "aiperf_version" in fields.data or "was_cancelled" in fields.data else "genai-perf"
    given = fields.part("input_config")
    if fields.data.get("was_cancelled"):
        raise InputError(f"{fields.place('was_cancelled')}: expected false, got true")
    errors = fields.data.get("error_summary") or []
    failed = sum(one.count("count") if one.has("count") else 1 for one in fields.rows("error_summary")) if errors else 0
    check_failed(fields, failed or int(fields.average("error_request_count")), "error_summary")
    many, requests = _in_flight(given), round(fields.average("request_count"))
    throughput, request = fields.part("request_throughput"), fields.average("request_latency")
    rate = throughput.seconds("avg")  # positive
    enough = ENOUGH_ROUNDS * many
    few = f"{fields.source}: {requests} requests include ramp-up and ramp-down; use --request-count {enough}"
    return BenchRun(
        fields.source,
        "serve",
        (many / rate if many else request,),
        tool=tool,
        model=_model(given),
        concurrency=many,
        mean_concurrency=request * rate,
        requests=requests,
        input_tokens=fields.average("input_sequence_length"),
        output_tokens=fields.average("output_sequence_length"),
        duration_s=fields.average("benchmark_duration"),
        request_s=request,
        ttft_s=fields.average("time_to_first_token"),
        tpot_s=fields.average("inter_token_latency"),
        note=few if 0 < requests < enough else "",
    )


def _in_flight(given: Fields) -> int:
    """Return the requests in flight: of the phase (AIPerf), the load generator (before 0.8), the stimulus or arguments
    (genai-perf); 0 if the export does not state them. InputError for any other load."""
    phases = [p for p in given.rows("phases") if not _excluded(p)]
    if phases:
        types = [phase.text("type") for phase in phases]
        if types != ["concurrency"]:
            place = given.place("phases")
            raise InputError(f"{place}: expected one phase of type concurrency, got {', '.join(types)}")
        return phases[0].count("concurrency") if phases[0].has("concurrency") else 1  # the default of a phase
    stimulus = given.part("perf_analyzer").part("stimulus")
    if stimulus.data:
        if set(stimulus.data) != {"concurrency"}:
            name = given.place("perf_analyzer.stimulus")
            raise InputError(f"{name}: expected concurrency, got {', '.join(map(str, stimulus.data))}")
        return stimulus.count("concurrency")
    load = given.part("loadgen") if given.has("loadgen") else given
    check_closed_loop(load)
    return load.count("concurrency") if load.has("concurrency") else 0


def _excluded(phase: Fields) -> bool:
    """Return whether AIPerf excludes a phase from its results."""
    return bool(phase.data.get("exclude_from_results")) or "warmup" in (phase.data.get("name"), phase.data.get("kind"))


def _model(given: Fields) -> str:
    """Return the first model that was requested."""
    arguments, endpoint = given.data, given.part("endpoint").data
    listed: Any = arguments.get("model_names") or arguments.get("model") or endpoint.get("model_names")
    if given.has("models"):
        listed = [one.text("name") for one in given.part("models").rows("items")]
    first = listed[0] if isinstance(listed, list) and listed else listed or ""
    if not isinstance(first, str):
        raise InputError(f"{given.place('model_names')}: expected names, got {shown(listed)}")
    return one_line(first, 200)
