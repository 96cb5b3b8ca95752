import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_ext import GatedConformerConfig, GatedConformerForKeywordDetection
from kws.gated_conformer_setting import SMALL, features, small_model


class TestLosses:
    def inputs(self):
        return {
            "input_features": features(4, 40, 16),
            "labels": torch.tensor([0, -100, 2, 1]),
            "location_targets": torch.tensor([[0.1, 0.5], [0.0, 0.0], [-0.2, 0.4], [0.0, 0.3]]),
        }

    def test_sum_is_weighted(self):
        weights = {"detection": 2.0, "classification": 3.0, "localization": 5.0, "gate": 7.0}
        output = small_model(**{f"{name}_loss_weight": w for name, w in weights.items()})(**self.inputs())
        expected = sum(weight * output[f"{name}_loss"] for name, weight in weights.items())
        torch.testing.assert_close(output.loss, expected)

    def test_places_are_learned_where_a_keyword_is(self):
        model, inputs = small_model(), self.inputs()
        output = model(**inputs)
        distance = (output.locations[:, 0] - inputs["location_targets"]).abs().sum(-1)[[0, 2, 3]].mean()
        torch.testing.assert_close(output.localization_loss, distance)
        inputs["location_targets"][1] = 9.0
        torch.testing.assert_close(model(**inputs).loss, output.loss)

    def test_windows_can_be_left_out_of_detection(self):
        model, inputs = small_model(), self.inputs()
        targets = torch.tensor([0.7, -100, 1.0, -100])
        output = model(**inputs, detection_targets=targets)
        logits = output.detection_logits[[0, 2], 0]
        expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets[[0, 2]])
        torch.testing.assert_close(output.detection_loss, expected)

    def test_cost_of_gates_is_the_share_of_work_that_is_expected(self):
        for cost in ("equal", "macs"):
            model = small_model(gate_cost=cost)
            output = model(**self.inputs())
            macs = torch.tensor(model.count_macs().modules).float()
            weights = macs / macs.sum() if cost == "macs" else torch.full((8,), 1 / 8)
            torch.testing.assert_close(output.gate_loss, (output.gate_probabilities @ weights).mean())

    def test_windows_without_a_keyword_can_count_more(self):
        inputs = self.inputs()
        shares = small_model()(**inputs).gate_probabilities[:, 0].mean(-1)
        plain, heavier = (small_model(gate_noise_factor=factor)(**inputs).gate_loss for factor in (1.0, 5.0))
        torch.testing.assert_close(plain, shares.mean())
        torch.testing.assert_close(heavier, (shares * torch.tensor([1.0, 5.0, 1.0, 1.0])).mean())

    def test_windows_without_a_keyword_alone_move_the_gates_by_their_factor(self):
        gradients = {}
        for labels in ([0, 1, 2, 0], [-100, -100, -100, -100]):
            for factor in (1.0, 4.0):
                model = small_model(gate_noise_factor=factor)
                model(features(4, 40, 16), labels=torch.tensor(labels)).gate_loss.backward()
                gradients[labels[0], factor] = torch.cat([layer.gates.weight.grad.flatten() for layer in model.layers])
        assert gradients[0, 1.0].abs().sum() > 0
        torch.testing.assert_close(gradients[0, 4.0], gradients[0, 1.0])
        torch.testing.assert_close(gradients[-100, 4.0], 4 * gradients[-100, 1.0])

    def test_noise_alone_has_a_loss(self):
        model = small_model().train()
        output = model(features(2, 40, 16), labels=torch.tensor([-100, -100]))
        output.loss.backward()
        assert output.loss.isfinite() and output.classification_loss == 0

    @pytest.mark.parametrize("relaxation", ["straight_through", "soft"])
    def test_gradients_reach_every_weight(self, relaxation):
        model = small_model(gate_relaxation=relaxation).train()
        model(**self.inputs()).loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []

    def test_gates_learn_from_the_task_too(self):
        model = small_model(gate_loss_weight=0.0).train()
        model(**self.inputs()).loss.backward()
        assert all(layer.gates.weight.grad.abs().sum() > 0 for layer in model.layers)

    def test_a_few_steps_close_the_gates_of_noise(self):
        torch.manual_seed(0)
        model = GatedConformerForKeywordDetection(GatedConformerConfig(**SMALL, gate_loss_weight=1.0)).train()
        clips = torch.cat([features(4, 40, 16) + 3, features(4, 40, 16, seed=2)])
        labels = torch.tensor([0, 0, 0, 0, -100, -100, -100, -100])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            model(clips, labels=labels).loss.backward()
            optimizer.step()
        output = model.eval()(clips)
        assert output.gates[4:].mean() < 0.5
        assert ((output.detection_logits[:, 0] > 0) == (labels >= 0)).all()

    @pytest.mark.parametrize("mode", ["autocast", "bfloat16", "checkpointing"])
    def test_in_less_memory(self, mode):
        model, inputs = small_model().train(), self.inputs()
        if mode == "checkpointing":
            torch.manual_seed(3)
            expected = model(**inputs).loss
            model.gradient_checkpointing_enable()
            torch.manual_seed(3)
            torch.testing.assert_close(model(**inputs).loss, expected)
        if mode == "bfloat16":
            model, inputs["input_features"] = model.to(torch.bfloat16), inputs["input_features"].to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            model(**inputs).loss.backward()
            output = model.eval()(inputs["input_features"])
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert 0 < output.gates.mean() < 1 and output.logits.isfinite().all()

    def test_with_the_trainer(self, tmp_path):
        rows = [{name: values[row] for name, values in self.inputs().items()} for row in range(4)]
        arguments = TrainingArguments(
            output_dir=tmp_path, max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True
        )
        trainer = Trainer(
            model=small_model(),
            args=arguments,
            train_dataset=rows,
            eval_dataset=rows,
            compute_metrics=lambda predicted: {"shape": list(predicted.predictions.shape)},
        )
        trainer.train()
        assert trainer.evaluate()["eval_shape"] == [4, 3]
