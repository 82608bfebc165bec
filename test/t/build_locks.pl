# The locks of the worker that builds indexes stand in rm_lock_report() with what
# was measured: its lock on the table with wait and hold, its waits for others'
# transactions, and what it holds on the index; also where it fails.

use strict;
use warnings;

use LabServer;
use Test::More;
use Time::HiRes qw(time usleep);

# for so long, in ms, somebody is in the worker's way
my $long = 300;

my $node = start_server('build_locks', q{
autovacuum = off
risky_migrations.lock_timeout = '20 s'
});
sql(q{
CREATE TABLE item (id int PRIMARY KEY, n int);
INSERT INTO item SELECT g, g FROM generate_series(1, 1000) g;
CREATE INDEX item_n ON item (n);
CREATE INDEX item_m ON item (n, id);
CALL rm_add_column('item', 'n', 'bigint');
CALL rm_backfill_batched();
CALL rm_enforce_not_null();
});

# The keepers' locks keep other sessions in their transactions.
sub start_keeper
{
	my ($number) = @_;
	my $keeper = start_call("keeper $number", "SELECT pg_advisory_lock($number)", 'SELECT pg_sleep(600)');
	wait_for("SELECT count(*) > 0 FROM pg_locks WHERE locktype = 'advisory' AND objid = $number AND granted", 'no keeper');
	return { number => $number, call => $keeper };
}

sub end_keeper
{
	my ($keeper) = @_;
	sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'keeper $keeper->{number}'");
	finish_call($keeper->{call});
	return;
}

# A session that does it in a transaction which stays open as long as the keeper.
sub start_kept
{
	my ($name, $statement, $number) = @_;
	return start_call($name, 'BEGIN', $statement, "SELECT pg_advisory_xact_lock($number)", 'COMMIT');
}

sub worker_waits
{
	my ($for, $amiss) = @_;
	wait_for("SELECT count(*) > 0 FROM pg_stat_activity
		WHERE backend_type = 'risky_migrations worker' AND wait_event = '$for'", $amiss);
	return;
}

# What the report has of the last build; conditions are about wait and hold.
sub report
{
	my ($conditions) = @_;
	return sql(qq{
SELECT string_agg(concat_ws(' ', relation, role, lock_mode, blocks_reads, blocks_writes, hold_is_exact$conditions), E'\n'
	ORDER BY role DESC, relation COLLATE "C", lock_mode)
FROM risky_migrations.lock_report
WHERE step = 'build' AND step_id = (SELECT max(id) FROM risky_migrations.step_log WHERE step = 'build')
	AND (role <> 'index' OR relation ~ 'rm_n_')});
}

# ---------------------------------------------------------------------------
# One that is cancelled
# ---------------------------------------------------------------------------

my @keepers = map { start_keeper($_) } 1 .. 2;
my $writer = start_kept('writer', 'INSERT INTO item VALUES (1001, 1001)', 1);
wait_for(q{SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = 'writer' AND wait_event = 'advisory'},
	'the writer does not write');
my $start = time;
my $swap = start_call('migration', 'CALL rm_swap()');
worker_waits('virtualxid', 'the build does not wait for the writer');
usleep(1000 * $long);
sql(q{SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = 'migration'});
ok(!finish_call($swap), 'the call is cancelled');
my $all = 1000 * (time - $start);
my $between = "BETWEEN $long AND $all";
is( report(", ' wait ' || (wait_ms $between), ' hold ' || (hold_ms $between)"),
	qq{public.item transactions ShareLock f f t  wait true  hold false
public.item table ShareUpdateExclusiveLock f f t  wait false  hold true},
	'what the cancelled build had held and waited for');

# ---------------------------------------------------------------------------
# The next one drops what it has left, and builds
# ---------------------------------------------------------------------------

$start = time;
$swap = start_call('migration', 'CALL rm_swap()');
worker_waits('virtualxid', 'the index is not dropped');
# behind the worker, and then in the way of the next one
my $locker = start_kept('locker', 'LOCK TABLE item IN SHARE UPDATE EXCLUSIVE MODE', 2);
wait_for(q{SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = 'locker' AND wait_event = 'relation'},
	'nobody stands behind the worker');
usleep(1000 * $long);
end_keeper($keepers[0]);
ends_well($writer, 'the writer commits');
worker_waits('relation', 'the worker does not wait for its lock');
usleep(1000 * $long);
end_keeper($keepers[1]);
ends_well($locker, 'so does who has locked the table');
ends_well($swap, 'the swap comes');
$all = 1000 * (time - $start);
$between = "BETWEEN $long AND $all";
is( report(", ' wait ' || (wait_ms $between), ' hold ' || (hold_ms $between)")
	  =~ s/rm_n_\d+_\d+/rm_n/gr,
	qq{public.item transactions ShareLock f f t  wait true  hold false
public.item table ShareUpdateExclusiveLock f f t  wait true  hold true
public.rm_n index AccessShareLock f f f  hold false
public.rm_n index RowExclusiveLock f f f  hold false
public.rm_n index ShareUpdateExclusiveLock f f f  hold true
public.rm_n index AccessShareLock f f f  hold false
public.rm_n index RowExclusiveLock f f f  hold false
public.rm_n dropped index AccessExclusiveLock f f f  hold false},
	'what was held and waited for by the workers');

$node->stop;
done_testing();
