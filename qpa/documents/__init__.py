"""The typed documents of the IR, one module a stage."""

from qpa.documents.account import ParameterAccount
from qpa.documents.adapter_spec import (
    AdapterSpec,
    AdapterTensor,
    BaseModelReference,
    BasisReference,
    LeftOut,
    ParentAdapter,
)
from qpa.documents.ansatz import MAX_QUBITS, Ansatz
from qpa.documents.base import Attachment, Document, PassOption, Provenance, Record
from qpa.documents.checkpoint import Checkpoint
from qpa.documents.data_summary import DataSummary, HubDataset, SplitSummary
from qpa.documents.explanation import (
    Contribution,
    DirectionShare,
    ExplainedPart,
    Explanation,
    PlaceShare,
)
from qpa.documents.frozen_adapter import FrozenAdapter
from qpa.documents.logical_circuit import LogicalCircuit
from qpa.documents.manifest import MANIFEST_PATH, Manifest, read_manifest
from qpa.documents.measurement import MeasuredContext, Measurement
from qpa.documents.native_circuit import GateCount, NativeCircuit
from qpa.documents.parametrized_tensor import ParametrizedTensor
from qpa.documents.resolved_configuration import Input, Package, ResolvedConfiguration, TrainedFrom
from qpa.documents.selection import Selection, Strategy, TriedCircuit
from qpa.documents.shared_basis import Bank, BasisTensor, ChosenBank, SharedBasis
from qpa.documents.tensors import TENSOR_RULES, Method, Role, TensorRef, TensorRules, TensorShape
from qpa.documents.trained_generator import Score, TrainedContext, TrainedGenerator, TrainingResult
from qpa.documents.verification import EngineCheck, Verification
from qpa.documents.weight_layout import (
    ChunkedTensor,
    ChunkGroup,
    Contexts,
    Decoder,
    Features,
    PlannedSize,
    WeightLayout,
    Windows,
    account_of,
)

__all__ = [
    "MANIFEST_PATH",
    "MAX_QUBITS",
    "TENSOR_RULES",
    "AdapterSpec",
    "AdapterTensor",
    "Ansatz",
    "Attachment",
    "Bank",
    "BaseModelReference",
    "BasisReference",
    "BasisTensor",
    "Checkpoint",
    "ChosenBank",
    "ChunkGroup",
    "ChunkedTensor",
    "Contexts",
    "Contribution",
    "DataSummary",
    "Decoder",
    "DirectionShare",
    "Document",
    "EngineCheck",
    "ExplainedPart",
    "Explanation",
    "Features",
    "FrozenAdapter",
    "GateCount",
    "HubDataset",
    "Input",
    "LeftOut",
    "LogicalCircuit",
    "Manifest",
    "MeasuredContext",
    "Measurement",
    "Method",
    "NativeCircuit",
    "Package",
    "ParameterAccount",
    "ParametrizedTensor",
    "ParentAdapter",
    "PassOption",
    "PlaceShare",
    "PlannedSize",
    "Provenance",
    "Record",
    "ResolvedConfiguration",
    "Role",
    "Score",
    "Selection",
    "SharedBasis",
    "SplitSummary",
    "Strategy",
    "TensorRef",
    "TensorRules",
    "TensorShape",
    "TrainedContext",
    "TrainedFrom",
    "TrainedGenerator",
    "TrainingResult",
    "TriedCircuit",
    "Verification",
    "WeightLayout",
    "Windows",
    "account_of",
    "read_manifest",
]
