"""Answers of Android's services, in the forms that devices give them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime_bench.conditions.looks import conditions_of
from runtime_bench.conditions.script import SAMPLE_BEGINS
from runtime_bench.records.reported import Conditions

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


def answered(service: str, text: str) -> Conditions:
    """The conditions of one look at which a service answered."""
    lines = [SAMPLE_BEGINS, "/proc/uptime:1.0 2.0", *(f"@{service}:{line}" for line in text.split("\n"))]
    return conditions_of("\n".join(lines))


@pytest.mark.parametrize(
    ("service", "text", "expected"),
    [
        ("battery", BATTERY["Android 7"], {"charging": True}),
        ("battery", BATTERY["Android 14, unplugged"], {"charging": False}),
        ("battery", BATTERY["a vendor's own lines behind them"], {"charging": True}),
        ("battery", BATTERY["no battery"], {"charging": True}),
        ("battery", BATTERY["set by hand"], {"charging": None}),
        ("battery", BATTERY["contradictory"], {"charging": None}),
        ("battery", BATTERY["no service"], {"charging": None}),
        ("thermal", THERMAL["Android 12"], {"thermal_status": 0, "hottest_c": 25.6}),
        ("thermal", THERMAL["hot"], {"thermal_status": 3, "hottest_c": 84.208}),
        ("thermal", THERMAL["set by hand"], {"thermal_status": None, "hottest_c": None}),
        ("thermal", THERMAL["no driver"], {"thermal_status": None, "hottest_c": None}),
        ("thermal", THERMAL["a status that is none"], {"thermal_status": None}),
        ("thermal", THERMAL["no service"], {"thermal_status": None, "hottest_c": None}),
        ("power", POWER["Android 9"], {"screen_on": True, "low_power": False}),
        ("power", POWER["asleep"], {"screen_on": False, "low_power": True}),
        ("power", POWER["always-on display"], {"screen_on": False, "low_power": None}),
        ("power", POWER["no display power"], {"screen_on": True, "low_power": False}),
        ("power", POWER["Android 4"], {"screen_on": False, "low_power": None}),
        ("power", POWER["unknown"], {"screen_on": None, "low_power": None}),
        ("power", POWER["no service"], {"screen_on": None, "low_power": None}),
        ("low_power", "1\n", {"low_power": True}),
        ("low_power", "null\n", {"low_power": False}),
        ("low_power", "2\n", {"low_power": None}),
        *(("battery", text, {"charging": None}) for text in ("", "AC powered: maybe")),
        # An expression that tries each of its spaces as the end of a name would take hours.
        ("battery", f"  vendor{' ' * 10**6}x\n\tAC powered = true \r\n  mode: level=7\n", {"charging": True}),
    ],
)
def test_answers(service: str, text: str, expected: dict[str, Any]) -> None:
    found = answered(service, text)
    for name, value in expected.items():
        assert getattr(found, name) == (() if value is None else (value,)), name
        assert bool(found.hidden.get(name)) == (value is None)


WORDS = sorted(
    {line for corpus in (BATTERY, THERMAL, POWER) for text in corpus.values() for line in text.split("\n")}
)
TORN = st.lists(st.sampled_from(WORDS).flatmap(lambda w: st.integers(0, len(w)).map(lambda n: w[:n])))
MIXED = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=30))).map("\n".join)


@settings(max_examples=200, deadline=None)
@given(st.one_of(TORN.map("\n".join), MIXED, st.text()))
@example("Thermal Status: 9999999999999999999999")
@example("Thermal Status: ٣")
@example("Current temperatures from HAL:\nTemperature{mValue=1e999, mType=0}")
def test_no_answer_crashes_a_reader_or_makes_a_number_up(text: str) -> None:
    for service in ("battery", "thermal", "power", "low_power"):
        found = answered(service, text)
        for number in (*found.hottest_c, *found.thermal_status):
            assert f"{number:g}" in text or str(number) in text
