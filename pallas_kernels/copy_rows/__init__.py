from pallas_kernels.copy_rows.api import take_rows as take_rows
from pallas_kernels.copy_rows.api import write_rows as write_rows
