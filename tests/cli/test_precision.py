import pytest
import torch

from companion import CompanionError, cli, train


@pytest.mark.parametrize(("instructions", "told"), [({}, True), ({"avx512_bf16": True}, False)])
def test_train_says_first_when_a_precision_cannot_pay(capsys, monkeypatch, tmp_path, instructions, told):
    def stop(*arguments, **settings):
        raise CompanionError("that is far enough.")

    monkeypatch.setattr(train, "fit", stop)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    out = str(tmp_path / "f.safetensors")
    with pytest.raises(SystemExit):
        cli.main(["train", "simple_cnn", "--precision", "bf16", "--device", "cpu", "--out", out])
    shown = capsys.readouterr()
    assert "that is far enough." in shown.err
    assert ("bf16 costs time on this CPU" in shown.out) == told
