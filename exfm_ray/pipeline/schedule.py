"""Which windows each role can work on."""

from __future__ import annotations

from exfm_ray.config.root import Config
from exfm_ray.training.job import Job


def vm_jobs(config: Config) -> list[Job]:
    """One job for all VMs of a teacher when they share a pass, else one for each."""
    if not config.vm.shared_pass:
        return [Job(f"vm-{student.name}", config, (student,)) for student in config.vm.models]
    teachers = dict.fromkeys(student.teacher or config.fm.name for student in config.vm.models)
    together = {
        teacher: tuple(s for s in config.vm.models if (s.teacher or config.fm.name) == teacher)
        for teacher in teachers
    }
    return [
        Job("vm" if teacher == config.fm.name else f"vm-of-{teacher}", config, students)
        for teacher, students in together.items()
    ]
