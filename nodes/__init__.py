"""The pack's nodes, one module per stage. A node checks its inputs, calls nested_core, and returns; no maths here."""

from .adjust import NestedAdjustSubject
from .apply import NestedApplySubject, NestedApplySubjectAdvanced
from .binding import NestedShowBinding
from .check import NestedCheckEncoder
from .crop import NestedCropSubject
from .encode import NestedEncodeSubject, NestedMergeSubjects
from .grid import NestedGridValues, NestedPictureGrid
from .library import NestedLoadSubject, NestedSaveSubject
from .loader import NestedEncoderLoader
from .record import NestedAttentionMaps, NestedExplain, NestedRecordAttention
from .separate import NestedSeparateSubjects

NODES = [
    NestedEncoderLoader,
    NestedCheckEncoder,
    NestedEncodeSubject,
    NestedApplySubject,
    NestedApplySubjectAdvanced,
    NestedAdjustSubject,
    NestedSeparateSubjects,
    NestedMergeSubjects,
    NestedSaveSubject,
    NestedLoadSubject,
    NestedCropSubject,
    NestedRecordAttention,
    NestedAttentionMaps,
    NestedExplain,
    NestedShowBinding,
    NestedGridValues,
    NestedPictureGrid,
]
