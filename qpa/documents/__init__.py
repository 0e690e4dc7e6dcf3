"""The typed documents of the IR, one module a stage."""

from qpa.documents.account import ParameterAccount
from qpa.documents.adapter_spec import (
    EMBEDDING_ROLES,
    METHOD_NAMES,
    ROLES_OF,
    AdapterSpec,
    AdapterTensor,
    BaseModelReference,
    Method,
    module_of,
)
from qpa.documents.base import Attachment, Document, PassOption, Provenance, Record
from qpa.documents.checkpoint import Checkpoint
from qpa.documents.frozen_adapter import FrozenAdapter
from qpa.documents.logical_circuit import LogicalCircuit
from qpa.documents.manifest import MANIFEST_PATH, Manifest, read_manifest
from qpa.documents.native_circuit import GateCount, NativeCircuit
from qpa.documents.tensors import TensorShape
from qpa.documents.trained_generator import TrainedGenerator, TrainingResult
from qpa.documents.verification import EngineCheck, Verification
from qpa.documents.weight_layout import (
    MAX_QUBITS,
    ChunkedTensor,
    ChunkGroup,
    FeatureKind,
    WeightLayout,
    Windows,
    n_feature_parameters,
)

__all__ = [
    "EMBEDDING_ROLES",
    "MANIFEST_PATH",
    "MAX_QUBITS",
    "METHOD_NAMES",
    "ROLES_OF",
    "AdapterSpec",
    "AdapterTensor",
    "Attachment",
    "BaseModelReference",
    "Checkpoint",
    "ChunkGroup",
    "ChunkedTensor",
    "Document",
    "EngineCheck",
    "FeatureKind",
    "FrozenAdapter",
    "GateCount",
    "LogicalCircuit",
    "Manifest",
    "Method",
    "NativeCircuit",
    "ParameterAccount",
    "PassOption",
    "Provenance",
    "Record",
    "TensorShape",
    "TrainedGenerator",
    "TrainingResult",
    "Verification",
    "WeightLayout",
    "Windows",
    "module_of",
    "n_feature_parameters",
    "read_manifest",
]
