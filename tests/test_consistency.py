"Back-projection: what it converges to, and what it refuses."
import pytest
import torch

from difiisr_dwt.consistency import back_project
from difiisr_dwt.degradations import downsample, upsample


@pytest.mark.parametrize('kernel', ['bicubic', 'cv2-cubic', 'matlab', 'box'])
@pytest.mark.parametrize('scale', [2, 4])
def test_back_projection_converges(kernel, scale):
    lr = torch.rand(2, 1, 9, 12, generator=torch.Generator().manual_seed(0)).double()
    sr = back_project(upsample(lr, scale), lr, kernel, scale, iterations=150)
    torch.testing.assert_close(downsample(sr, kernel, scale), lr, atol=1e-7, rtol=0)
    torch.testing.assert_close(back_project(sr, lr, kernel, scale), sr, atol=1e-6, rtol=0)  # a fixed point
    assert torch.equal(back_project(sr, lr, kernel, scale, iterations=0), sr)


def test_back_projection_refuses():
    with pytest.raises(ValueError, match='16x16'): back_project(torch.rand(1, 1, 16, 16), torch.rand(1, 1, 4, 5))
    with pytest.raises(ValueError, match='nearest'):
        back_project(torch.rand(1, 1, 16, 16), torch.rand(1, 1, 4, 4), kernel='nearest')
