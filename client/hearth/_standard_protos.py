"""The few messages of grpc.health.v1 and google.rpc that the client needs.

Their packages (grpcio-health-checking, googleapis-common-protos) are no dependency of the client. The fields, by name,
number and type, are those of grpc/health/v1/health.proto, google/rpc/status.proto and google/rpc/error_details.proto;
fields that the client does not read are left out, which the wire format allows. They live in a descriptor pool of their
own, so that a program that has those packages too sees no clash. Called by `_operations` and `_translate`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

_STRING, _BYTES, _INT32, _INT64, _MESSAGE = (
    FieldDescriptorProto.TYPE_STRING,
    FieldDescriptorProto.TYPE_BYTES,
    FieldDescriptorProto.TYPE_INT32,
    FieldDescriptorProto.TYPE_INT64,
    FieldDescriptorProto.TYPE_MESSAGE,
)

# Message -> (field, number, type, message type, is repeated). An enum reads as int32: the wire is the same.
_MESSAGES: dict[str, tuple[tuple[str, int, FieldDescriptorProto.Type.ValueType, str, bool], ...]] = {
    "HealthCheckRequest": (("service", 1, _STRING, "", False),),
    "HealthCheckResponse": (("status", 1, _INT32, "", False),),
    "Status": (("message", 2, _STRING, "", False), ("details", 3, _MESSAGE, "Any", True)),
    "Any": (("type_url", 1, _STRING, "", False), ("value", 2, _BYTES, "", False)),
    "BadRequest": (("field_violations", 1, _MESSAGE, "FieldViolation", True),),
    "FieldViolation": (("field", 1, _STRING, "", False), ("description", 2, _STRING, "", False)),
    "RetryInfo": (("retry_delay", 1, _MESSAGE, "Duration", False),),
    "Duration": (("seconds", 1, _INT64, "", False), ("nanos", 2, _INT32, "", False)),
    "QuotaFailure": (),
    "RequestInfo": (("request_id", 1, _STRING, "", False),),
}


@cache
def message_class(name: str) -> Any:
    """The protobuf class of that message; KeyError if it is not among those of this module."""
    return GetMessageClass(_pool().FindMessageTypeByName(f"hearth.standard.{name}"))


@cache
def _pool() -> DescriptorPool:
    file = FileDescriptorProto(name="hearth/standard.proto", package="hearth.standard", syntax="proto3")
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for name, number, kind, type_name, is_repeated in fields:
            message.field.add(
                name=name,
                number=number,
                type=kind,
                type_name=f".hearth.standard.{type_name}" if type_name else None,
                label=FieldDescriptorProto.LABEL_REPEATED if is_repeated else FieldDescriptorProto.LABEL_OPTIONAL,
            )
    pool = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return pool
