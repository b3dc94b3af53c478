"""Diffusion: noise is added by a schedule of discrete timesteps, and the denoiser predicts the noise or the velocity.

Sources: Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models", L_simple; the v target is that of Salimans
and Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models", appendix D; the weights are those of
Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Diffusion"]


class Diffusion:
    """The objective of a model that was trained by diffusion.

    Args:
        schedule: a DDPMScheduler; its prediction type is what the denoiser predicts.
    """

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule

    @property
    def held_out_times(self) -> tuple[int, ...]:
        """Eight noise levels, from nearly clean to nearly all noise."""
        return (60, 180, 300, 420, 540, 660, 780, 900)

    def draw_times(self, count: int, generator: "torch.Generator") -> "torch.Tensor":
        """Timesteps of so many rows, int64 [count], all equally likely."""
        import torch

        return torch.randint(0, self.schedule.config.num_train_timesteps, (count,), generator=generator)

    def add_noise(self, latents: "torch.Tensor", noise: "torch.Tensor", times: "torch.Tensor") -> "torch.Tensor":
        """The latents at these times."""
        return self.schedule.add_noise(latents, noise, times)

    def target(self, latents: "torch.Tensor", noise: "torch.Tensor", times: "torch.Tensor") -> "torch.Tensor":
        """What the denoiser should have predicted."""
        if self.schedule.config.prediction_type == "v_prediction":
            return self.schedule.get_velocity(latents, noise, times)
        return noise

    def weights(self, times: "torch.Tensor", gamma: float) -> "torch.Tensor":
        """Each row's loss weight, float32 [batch]: min(SNR, gamma) / SNR, for v-prediction min(SNR, gamma) / (SNR + 1).

        The signal-to-noise ratio is that of the noised latent, alpha_bar / (1 - alpha_bar).
        """
        alpha_bar = self.schedule.alphas_cumprod.to(times.device)[times].float()
        # Written without a division by SNR, so that an SNR of 0 (a schedule that ends in pure noise) has a weight.
        clipped = (alpha_bar / (1 - alpha_bar)).clamp(max=gamma)
        if self.schedule.config.prediction_type == "v_prediction":
            return clipped * (1 - alpha_bar)  # SNR + 1 = 1 / (1 - alpha_bar)
        return (gamma * (1 - alpha_bar) / alpha_bar).clamp(max=1.0)
