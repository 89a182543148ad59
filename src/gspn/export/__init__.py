"""Export of trained models.

    export_onnx       an ONNX file of standard operators for any runtime, any batch and image size
    export_aoti       a package compiled ahead of time by torch's AOTInductor, for Python with torch and gspn
    export_program    torch.export with batch, height and width left open; the other two start from it

ONNX needs the extra `onnx`, whose packages are only imported when needed.
"""

from gspn.export.aoti import export_aoti
from gspn.export.onnx import export_onnx
from gspn.export.program import Exported, ExportError, export_program

__all__ = ["ExportError", "Exported", "export_aoti", "export_onnx", "export_program"]
