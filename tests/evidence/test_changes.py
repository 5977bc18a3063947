"""The evidence before and after, on pages as the project writes them."""

from calibration.evidence.changes import page_errors

PAGE = """# Accuracy

## Shipped fits

| GPU | operator | format | unseen | vllm | sglang |
| --- | --- | --- | --- | ---: | ---: |
| a100 | gemm | bf16 | (n, k) of GEMMs | 5.0 (6,473) | |

## a100

| method | rows | MAPE | median | coverage | width |
| --- | ---: | ---: | ---: | ---: | ---: |
| prunesim | 400 | 6.86 | 4.74 | **80.3** | 15.0 |
| prunesim | all | 5.22 | 3.51 | 90.8 | 12.3 |

## Servers

| rows | cases | tokens/s: error | tokens/s: inside | first token: error | first token: inside |
| --- | ---: | ---: | ---: | ---: | ---: |
| vllm | 38 | 10.8 % | 68.4 % | 14.1 % | 76.3 % |

## Single rows

| engine | measured | predicted | error |
| --- | ---: | ---: | ---: |
| vllm | 1.0 s | 1.1 s | +10 % |
"""


def test_every_set_of_a_page_has_its_error_and_single_rows_have_none() -> None:
    assert page_errors(PAGE) == {
        "Shipped fits: a100 gemm bf16 (n, k) of GEMMs, vllm": 5.0,
        "a100: prunesim 400": 6.86,
        "a100: prunesim all": 5.22,
        "Servers: vllm, tokens/s": 10.8,
        "Servers: vllm, first token": 14.1,
    }
