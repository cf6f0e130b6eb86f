"""The wire contracts of model1.v1. Everything named *_pb2* is generated: edit the .proto files."""
