"""Classes that are folders: root/CLASS/IMAGE, or root/SPLIT/CLASS/IMAGE. Images may lie at any depth below a class."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from gspn.data.folders import PART, Found, is_image
from gspn.data.images import SPLIT_NAMES, DataError, listed
from gspn.files import shown


@dataclass
class ClassFolders:
    """The images of one split.

    Attributes:
        root: the folder with the class folders. class_names: theirs.
        files: the images, class by class. labels: the number of the class of each.
    """

    root: Path
    class_names: list[str]
    files: list[Path] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


def class_folders(found: Found) -> tuple[dict[str, ClassFolders], list[str]]:
    """The images of a folder with class folders.

    Returns: ({split: its images}, notes for the user).
    Errors: DataError, also for folders that cannot be classes because a folder above or below was meant.
    """
    splits = _splits(found)
    _refuse_links_to_each_other(found, splits.values())
    result, used = {}, set()
    for name, root in splits.items():
        classes = found.inside(root)
        if not classes:
            raise DataError(f"{root} has no class folders: expected {root}/CLASS/IMAGE")
        if {folder.name.lower() for folder in classes} == {"images", "masks"}:
            raise DataError(
                f"{root} holds images/ and masks/, as `gspn train-segmentation` takes them: expected class folders; if "
                "these are classes, rename one of them"
            )
        files = {folder: [] for folder in classes}
        for file in found.files:
            if is_image(file) and file.is_relative_to(root) and file.parent != root:
                files[root / file.parts[len(root.parts)]].append(file)
        _refuse_wrong_level(root, files)
        result[name] = ClassFolders(root, [shown(folder.name) for folder in classes])
        for label, (folder, images) in enumerate(files.items()):
            if not images and name == "train":
                raise DataError(f"the class folder {folder} holds no images")
            result[name].files += images
            result[name].labels += [label] * len(images)
        used.update(result[name].files)
    unused = [file for file in found.files if file not in used]
    beside = found.names([file for file in unused if is_image(file)])
    others = found.names([file for file in unused if not is_image(file)])
    told = (
        (beside, "image outside of the class folders", "images outside of the class folders"),
        (others, "file that is no image by its name", "files that are no images by their names"),
    )
    return result, [f"ignored {listed(names, one, many)}" for names, one, many in told if names]


def _splits(found):
    """{split: the folder with its class folders}."""
    path = found.root
    folders = {folder.name: folder for folder in found.inside(path)}
    strange = [name for name in folders if name.lower() not in SPLIT_NAMES]
    if "train" not in folders and strange:  # Train may be a class beside others
        if all(PART.fullmatch(name) for name in folders):
            raise DataError(
                f"{path} holds {listed(list(folders), 'folder', 'folders')}, which sounds like parts of a data set, "
                f"not like classes: expected parts to be called {', '.join(SPLIT_NAMES)}; rename them, or, if they are "
                f"classes, {_as_classes(path)}"
            )
        return {"train": path}
    if strange:
        raise DataError(
            f"{path} has a train folder beside {listed(strange, 'folder', 'folders')}: expected either class "
            f"folders only, or only {', '.join(SPLIT_NAMES)}; if train is a class, {_as_classes(path)}"
        )
    splits = {SPLIT_NAMES[name.lower()]: folder for name, folder in folders.items()}
    if len(splits) < len(folders):
        raise DataError(f"{path} has two folders for one split: {', '.join(folders)}")
    return splits


def _as_classes(path):
    """What to do where the name of a class is that of a split."""
    return f"move all classes into a new folder {path / 'train'}, as {path / 'train'}/CLASS/IMAGE"


def _refuse_links_to_each_other(found, roots):
    """Raises DataError if a class or a split is a link to another one."""
    for link in found.again:
        target = Path(os.path.realpath(link))
        around = Path(os.path.realpath(link.parent)).is_relative_to(target)
        if (link.parent == found.root or link.parent in roots) and not around:
            raise DataError(
                f"{link} is a link to {target}, which is read already: the same images would count twice, in two "
                "classes or two splits; remove the link"
            )


def _refuse_wrong_level(root, files):
    """Raises DataError where the class folders, {folder: its images}, cannot be classes: none of them holds an image
    itself, and one of them holds parts of a data set, or several folders with images."""
    if any(image.parent == folder for folder, images in files.items() for image in images):
        return
    inside = {}
    for folder, images in files.items():
        inside[folder] = sorted({image.parts[len(folder.parts)] for image in images})
    parts = [folder for folder, names in inside.items() if any(map(PART.fullmatch, names))]
    several = [folder for folder, names in inside.items() if len(names) > 1]
    for folder in parts or several:
        what = "parts of a data set" if parts else "folders with images"
        meant = folder if len(files) == 1 else f"one of them, such as {folder}"
        names = [each.name for each in files]
        otherwise = (
            f"; if {', '.join(names[:5])} are classes after all, put images (or links to them) into them directly"
        )
        raise DataError(
            f"{root} seems to be a folder too high. It holds {listed(names, 'folder', 'folders')}, without an image of "
            f"their own; in {folder.name} there are {what}: {', '.join(inside[folder][:5])}. "
            f"Expected {root}/CLASS/IMAGE: give {meant}{'' if parts else otherwise}"
        )
