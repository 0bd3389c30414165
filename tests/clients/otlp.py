"""Reads an export of spans as the protocol's own definition has it, and prints the names of all spans."""

import json
import sys

from google.protobuf.json_format import ParseDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

sent = json.load(sys.stdin)
for span in sent["resourceSpans"][0]["scopeSpans"][0]["spans"]:
    # In OTLP's JSON ids are hexadecimal; protobuf's own JSON would have them in base64.
    for key in ("traceId", "spanId", "parentSpanId"):
        if key in span:
            assert len(bytes.fromhex(span.pop(key))) == (16 if key == "traceId" else 8)
request = ParseDict(sent, ExportTraceServiceRequest())
for resource in request.resource_spans:
    assert any(it.key == "service.name" and it.value.string_value for it in resource.resource.attributes)
    for scope in resource.scope_spans:
        for span in scope.spans:
            print(span.name)
