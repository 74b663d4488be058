"""Answers of Android's services, in the forms that devices give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime_bench.conditions import android
from runtime_bench.conditions.android import Reading

BATTERY = {
    "Android 7": """Current Battery Service state:
  AC powered: false
  USB powered: true
  Wireless powered: false
  Max charging current: 500000
  status: 2
  health: 2
  present: true
  level: 85
  scale: 100
  voltage: 4203
  temperature: 291
  technology: Li-ion
""",
    "Android 14, unplugged": """Current Battery Service state:
  AC powered: false
  USB powered: false
  Wireless powered: false
  Dock powered: false
  Max charging current: 0
  Charge counter: 2865000
  status: 3
  health: 2
  present: true
  level: 71
  scale: 100
  technology: Li-ion
  Charging state: 0
  Charging policy: 0
""",
    "a vendor's own lines behind them": """Current Battery Service state:
  AC powered: true
  USB powered: false
  Wireless powered: false
  Dock powered: false
  status: 5
  present: true
  level: 100
  scale: 100
Battery current : 412, wireless high voltage charge: 0
  LED Charging: true
  level: 3
  mBatteryHighVoltageCharger: false
""",
    "a scale of 255": "  AC powered: false\n  USB powered: false\n  status: 3\n  level: 51\n  scale: 255\n",
    "no battery": "  AC powered: true\n  USB powered: false\n  status: 1\n  present: false\n  level: 0\n  scale: 100\n",
    "set by hand": """Current Battery Service state:
  (UPDATES STOPPED -- use 'reset' to restart)
  AC powered: false
  USB powered: false
  status: 3
  level: 100
  scale: 100
""",
    "contradictory": "  AC powered: false\n  USB powered: false\n  status: 2\n  level: 40\n  scale: 100\n",
    "no service": "Can't find service: battery\n",
    "no permission": "Permission Denial: can't dump BatteryService from pid=1, uid=2000\n",
}
THERMAL = {
    "Android 12": """IsStatusOverride: false
ThermalEventListeners:
\tcallbacks: 1
ThermalStatusListeners:
\tcallbacks: 4
Thermal Status: 0
Cached temperatures:
\tTemperature{mValue=69.0, mType=0, mName=AP, mStatus=0}
HAL Ready: true
HAL connection:
\tThermalHAL 2.0 connected: yes
Current temperatures from HAL:
\tTemperature{mValue=25.6, mType=0, mName=AP, mStatus=0}
\tTemperature{mValue=0.0, mType=2, mName=SUBBAT, mStatus=0}
\tTemperature{mValue=-273.15, mType=4, mName=USB, mStatus=0}
\tTemperature{mValue=NaN, mType=5, mName=PA, mStatus=0}
Current cooling devices from HAL:
\tCoolingDevice{mValue=99, mType=2, mName=thermal-cpufreq-0}
""",
    "hot": "Thermal Status: 3\nHAL Ready: true\nCurrent temperatures from HAL:\n Temperature{mValue=84.208, mType=0}\n",
    "set by hand": "IsStatusOverride: true\nThermal Status: 2\nHAL Ready: true\n",
    "no driver": "IsStatusOverride: false\nThermal Status: 0\nHAL Ready: false\n",
    "a status that is none": "Thermal Status: 9\nHAL Ready: true\n",
    "no service": "Can't find service: thermalservice\n",
}
POWER = {
    "Android 9": "  mWakefulness=Awake\n  mLowPowerModeEnabled=false\nDisplay Power: state=ON\n",
    "asleep": "  mWakefulness=Asleep\n  mSettingBatterySaverEnabled=true\nDisplay Power: state=OFF\n",
    "always-on display": "  mWakefulness=Dozing\nDisplay Power: state=DOZE_SUSPEND\n",
    "no display power": "  mWakefulness=Awake\n  mSettingBatterySaverEnabled=false\n  mStickyEnabled=true\n",
    "Android 4": "  mScreenOn=false\n",
    "unknown": "  mWakefulness=Daydreaming\nDisplay Power: state=HIBERNATING\n",
    "no service": "Can't find service: power\n",
}


@pytest.mark.parametrize(
    ("name", "percent", "charging"),
    [
        ("Android 7", 85.0, True),
        ("Android 14, unplugged", 71.0, False),
        ("a vendor's own lines behind them", 100.0, True),
        ("a scale of 255", 20.0, False),
        ("no battery", None, True),
        ("set by hand", None, None),
        ("contradictory", 40.0, None),
        ("no service", None, None),
        ("no permission", None, None),
    ],
)
def test_batteries(name: str, percent: float | None, charging: bool | None) -> None:
    found = android.battery_percent(BATTERY[name]), android.charging(BATTERY[name])
    assert [one.value for one in found] == [percent, charging]
    assert all(one.why for one in found if one.value is None)


@pytest.mark.parametrize(
    ("name", "status", "hottest"),
    [
        ("Android 12", 0, 25.6),
        ("hot", 3, 84.208),
        ("set by hand", None, None),
        ("no driver", None, None),
        ("a status that is none", None, None),
        ("no service", None, None),
    ],
)
def test_heat(name: str, status: int | None, hottest: float | None) -> None:
    found = android.thermal_status(THERMAL[name]), android.hottest_c(THERMAL[name])
    assert [one.value for one in found] == [status, hottest]
    assert all(one.why for one in found if one.value is None)


@pytest.mark.parametrize(
    ("name", "screen", "saver"),
    [
        ("Android 9", True, False),
        ("asleep", False, True),
        ("always-on display", False, None),
        ("no display power", True, False),
        ("Android 4", False, None),
        ("unknown", None, None),
        ("no service", None, None),
    ],
)
def test_power(name: str, screen: bool | None, saver: bool | None) -> None:
    found = android.screen_on(POWER[name]), android.saver(POWER[name])
    assert [one.value for one in found] == [screen, saver]
    assert all(one.why for one in found if one.value is None)


@pytest.mark.parametrize(
    ("text", "value"), [("1\n", True), ("0\n", False), ("null\n", False), ("2\n", None), ("", None)]
)
def test_the_setting(text: str, value: bool | None) -> None:
    assert android.low_power(text).value is value


READERS = (
    android.battery_percent,
    android.charging,
    android.thermal_status,
    android.hottest_c,
    android.screen_on,
    android.low_power,
    android.saver,
)
WORDS = sorted(
    {line for corpus in (BATTERY, THERMAL, POWER) for text in corpus.values() for line in text.split("\n")}
)
TORN = st.lists(st.sampled_from(WORDS).flatmap(lambda w: st.integers(0, len(w)).map(lambda n: w[:n])))
MIXED = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=30))).map("\n".join)


@settings(max_examples=200, deadline=None)
@given(st.one_of(TORN.map("\n".join), MIXED, st.text()))
@example("level: 9999999999999999999999\nscale: 100")
@example("level: ٣\nscale: 100")
@example("Current temperatures from HAL:\nTemperature{mValue=1e999, mType=0}")
def test_no_answer_crashes_a_reader_or_makes_a_number_up(text: str) -> None:
    readings: list[Reading[Any]] = [reader(text) for reader in READERS]
    for reading in readings:
        assert reading.value is None or not reading.why
        assert reading.value is not None or reading.why
        number = reading.value
        if isinstance(number, int | float) and not isinstance(number, bool) and reading is not readings[0]:
            assert f"{number:g}" in text or str(number) in text
    percent = readings[0].value
    assert percent is None or 0 <= percent <= 100


def test_a_long_line_of_a_vendor_is_passed_over() -> None:
    # An expression that tries each of its spaces as the end of a name would take hours.
    text = f"  vendor{' ' * 10**6}x\n\tlevel = 50 \r\n  mode: level=7\n"
    assert android.battery_percent(text).value == 50.0


@pytest.mark.parametrize("reader", READERS)
def test_nothing_is_no_answer(reader: Callable[[str], Reading[Any]]) -> None:
    assert reader("").value is None
