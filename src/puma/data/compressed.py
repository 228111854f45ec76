"""Images in a compressed ``.npz`` member."""

from __future__ import annotations

import numpy as np

from puma.data.archive import Member
from puma.data.images import ArrayImages, Images, Shape
from puma.data.inflate import MemberReader
from puma.data.npy import Header


def compressed_images(member: Member, header: Header, shape: Shape) -> Images:
    """Open the images of a compressed member."""
    with MemberReader(member) as reader:
        reader.read(header.length)
        data = reader.read(header.data_size)
    array = np.frombuffer(data, np.uint8)
    return ArrayImages(array.reshape(shape, order="F" if header.fortran_order else "C"))
