"""A message as plain values, as `--format json` prints it: numbers are numbers, names are words.

protobuf's own JSON has 64-bit numbers as strings, which nobody who reads ours expects.
"""

import json
from typing import Any

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message


def as_json(message: Message) -> str:
    return json.dumps(as_plain(message), indent=2)


def as_plain(message: Message) -> dict[str, object]:
    """Every field; one that is unset and could be told from its default is None."""
    fields: Any = message.DESCRIPTOR.fields  # each of two classes of the same surface
    return {field.name: _field(message, field) for field in fields}


def _field(message: Message, field: FieldDescriptor) -> object:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(sorted(value.items()))
    if field.is_repeated:
        return [_value(each, field) for each in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _value(value, field)


def _value(value: object, field: FieldDescriptor) -> object:
    if isinstance(value, Message):
        return as_plain(value)
    if isinstance(value, bytes):
        return value.hex()
    if field.enum_type is not None:
        assert isinstance(value, int)
        return enum_word(field.enum_type, value)
    return value


def enum_word(enum: EnumDescriptor, number: int) -> str:
    """KV_TIER_DISK is disk: every name begins with that of its enum."""
    unspecified = enum.values_by_number[0].name
    prefix = unspecified.removesuffix("UNSPECIFIED")
    return enum.values_by_number[number].name.removeprefix(prefix).lower()
