import pytest
from golden import build_model


@pytest.fixture(scope="session")
def session_model():
    return build_model()


@pytest.fixture
def golden_model(session_model):
    """The golden model, built once; eager attention, no gradients left over."""
    session_model.set_attn_implementation("eager")
    session_model.zero_grad(set_to_none=True)
    return session_model.eval()
