"""A radiometric JPEG as FLIR cameras write it, after ExifTool's description of the tags, from a model of what they see."""
import io
import math
import struct
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Camera:
    """Calibration and conditions; temperatures in kelvin. Offsets of the record in `record`."""

    emissivity: float = 1.0
    distance: float = 0.0  # metres
    reflected: float = 293.15
    air: float = 293.15
    window: float = 293.15
    window_transmission: float = 1.0
    humidity: float = 0.5  # of 1
    r1: float = 21106.77
    b: float = 1501.0
    f: float = 1.0
    o: int = -7340
    r2: float = 0.012545258
    alpha: tuple[float, float] = (0.006569, 0.01262)
    beta: tuple[float, float] = (-0.002276, -0.00667)
    x: float = 1.9

    def signal(self, kelvin):
        """Counts of a black body just before the lens: Planck's law over the camera's band."""
        return self.r1 / (self.r2 * (np.exp(self.b / kelvin) - self.f)) - self.o

    def temperature(self, counts):
        """Kelvin, the inverse of `signal`."""
        return self.b / np.log(self.r1 / (self.r2 * (counts + self.o)) + self.f)

    def half_way(self):
        """Transmission of half of the air between object and camera (FLIR's model, from humidity and distance)."""
        t = self.air - 273.15
        water = self.humidity * math.exp(1.5587 + 0.06939 * t - 0.00027816 * t**2 + 0.00000068455 * t**3)
        parts = [math.exp(-math.sqrt(self.distance / 2) * (a + b * math.sqrt(water)))
                 for a, b in zip(self.alpha, self.beta, strict=True)]
        return self.x * parts[0] + (1 - self.x) * parts[1]

    def _gain_and_offset(self):
        """Counts at the lens = gain · counts of the object + offset: emission and reflection, air, window, air."""
        gain, offset = self.emissivity, (1 - self.emissivity) * self.signal(self.reflected)
        for share, there in ((self.half_way(), self.air), (self.window_transmission, self.window),
                             (self.half_way(), self.air)):
            gain, offset = share * gain, share * offset + (1 - share) * self.signal(there)
        return gain, offset

    def counts(self, kelvin):
        """What the camera counts, rounded, of an object at a temperature."""
        gain, offset = self._gain_and_offset()
        return np.rint(gain * self.signal(kelvin) + offset).astype(np.uint16)

    def kelvin(self, counts):
        """The object's temperature by the counts: the closed form."""
        gain, offset = self._gain_and_offset()
        return self.temperature((np.asarray(counts, np.float64) - offset) / gain)

    def record(self):
        """The camera-info record."""
        record = bytearray(0x400)
        struct.pack_into("<H", record, 0, 2)
        values = {0x20: self.emissivity, 0x24: self.distance, 0x28: self.reflected, 0x2c: self.air, 0x30: self.window,
                  0x34: self.window_transmission, 0x3c: self.humidity, 0x58: self.r1, 0x5c: self.b, 0x60: self.f,
                  0x70: self.alpha[0], 0x74: self.alpha[1], 0x78: self.beta[0], 0x7c: self.beta[1], 0x80: self.x,
                  0x30c: self.r2}
        for offset, value in values.items():
            struct.pack_into("<f", record, offset, value)
        struct.pack_into("<i", record, 0x308, self.o)
        return bytes(record)


def as_png(counts):
    """Counts as a 16-bit PNG with the bytes swapped, as most FLIR cameras do."""
    buffer = io.BytesIO()
    Image.fromarray(counts.byteswap()).save(buffer, "PNG")
    return buffer.getvalue()


def fff(counts, camera, png=False, kinds=(1, 32)):
    """The FFF container: header, directory, raw thermal image (type 1), camera info (type 32)."""
    body = as_png(counts) if png else counts.astype("<u2").tobytes()
    records = {1: struct.pack("<HHH", 2, *counts.shape[::-1]).ljust(32, b"\0") + body, 32: camera.record()}
    directory, data, start = b"", b"", 64 + 32 * 14  # as in cameras' files, most of the 14 entries are empty
    for kind in kinds:
        subtype = 3 if png and kind == 1 else 2 if kind == 1 else 1
        directory += struct.pack(">HHIIII", kind, subtype, 100, kind, start + len(data), len(records[kind])).ljust(32, b"\0")
        data += records[kind]
    header = b"FFF\0" + b"a camera".ljust(16, b"\0") + struct.pack(">III", 100, 64, 14)
    return header.ljust(64, b"\0") + directory.ljust(32 * 14, b"\0") + data


def flir_jpeg(counts, camera, preview, png=False, model="", orientation=1, segment=60000, kinds=(1, 32)):
    """The whole file: a JPEG of `preview` [H, W] or [H, W, 3], the FFF container spread over APP1 segments."""
    exif = Image.Exif()
    if model:
        exif[0x010f], exif[0x0110] = "FLIR Systems AB", model
    if orientation != 1:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(preview).save(buffer, "JPEG", quality=90, exif=exif)
    picture, container = buffer.getvalue(), fff(counts, camera, png, kinds)
    parts = [container[k:k + segment] for k in range(0, len(container), segment)]
    segments = b""
    for number, part in enumerate(parts):
        segments += b"\xff\xe1" + struct.pack(">H", len(part) + 10) + b"FLIR\0\1" + bytes([number, len(parts) - 1]) + part
    # after EXIF's own APP1, where there is one, as cameras do
    at = 2 + 2 + int.from_bytes(picture[4:6], "big") if picture[2:4] in (b"\xff\xe1", b"\xff\xe0") else 2
    return picture[:at] + segments + picture[at:]
