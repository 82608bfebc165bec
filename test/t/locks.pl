# What others have to wait for, as the server itself records it.
#
# log_lock_waits with a deadlock_timeout of a few milliseconds writes down every
# wait for a lock: who, for which relation or transaction, how long.  Under
# pgbench none of its sessions may wait much longer than the migration's bounds
# during the three steps; behind the direct change they do.  Then the two cases
# in which a lock could be held or asked for without end: a synchronous standby
# that is missing, and an autovacuum that does not give way.

use strict;
use warnings;

use LabServer;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

my $rows = 200_000;

# Lock time limit of the migration, in ms, and what is "much above" it: only to
# tell milliseconds from the seconds that a queue without bound would take.
my $bound = 100;
my $much = 1_000;

my $node = start_lab('locks', $rows, qq{
log_line_prefix = '%m [%p] %a '
log_lock_waits = on
deadlock_timeout = 5ms
autovacuum = off
risky_migrations.lock_timeout = $bound
risky_migrations.lock_retries = 10000
risky_migrations.lock_retry_max_delay = 100
});
my $large = sql(q{SELECT 'large_record'::regclass::oid});

my $dir = PostgreSQL::Test::Utils::tempdir;
PostgreSQL::Test::Utils::append_to_file(
	"$dir/write.sql", qq{
\\set id random(1, $rows)
SELECT risky_migrations.lab_write($rows);
SELECT name FROM large_record WHERE id = :id;
});

# ---------------------------------------------------------------------------
# Under pgbench
# ---------------------------------------------------------------------------

# The waits, in ms, of pgbench's sessions in the log since that position: all,
# or those for that relation.
sub waits
{
	my ($from) = @_;
	my $log = slurp_file($node->logfile, $from);
	my @waits;
	# "acquired" and "still waiting" are of the one who waits, at his end and
	# at his first look; a wait that ended with the log has the latter only
	while ($log =~ /\] pgbench LOG:  process \d+ (?:acquired|still waiting for) \w+ on (.*?) after ([\d.]+) ms/g)
	{
		push @waits, { for => $1, ms => $2 };
	}
	return @waits;
}

# Waits until pgbench has inserted some further rows.
sub let_pgbench_write
{
	my $from = sql(q{SELECT last_value FROM large_record_id_seq});
	wait_for("SELECT last_value > $from + 200 FROM large_record_id_seq", 'pgbench writes nothing');
	return;
}

# Migrates to each of the targets while pgbench runs; returns the waits.
sub under_pgbench
{
	my (@targets) = @_;
	my $from = -s $node->logfile;
	my $pgbench = start_pgbench($dir, '-R', '300', '-c', '4', '-j', '2', '-f', "$dir/write.sql");
	foreach my $target (@targets)
	{
		let_pgbench_write();
		sql("CALL rm_migrate('$target')");
	}
	let_pgbench_write();
	ok(end_pgbench($pgbench), "@targets: no transaction of pgbench failed")
	  or diag slurp_file("$dir/err");
	is(sql('SELECT rows_wrong FROM rm_lab_check()'), 0, "@targets: every row is right");
	return waits($from);
}

sub longest
{
	my ($waits) = @_;
	my ($worst) = sort { $b->{ms} <=> $a->{ms} } @$waits;
	return $worst // { ms => 0, for => 'nothing' };
}

foreach my $way ([ '0003', '0004', '0005' ], [ '0004', '0003', '0001' ])
{
	my @waits = under_pgbench(@$way);
	my $worst = longest(\@waits);
	note scalar(@waits) . " waits, the longest $worst->{ms} ms for $worst->{for}";
	cmp_ok($worst->{ms}, '<', $much, "@$way: nobody waits much above the bound");
	is( sql(qq{SELECT count(*) FROM rm_lock_report()
		WHERE blocks_reads AND hold_ms > $much AND approach = 'three_step'}),
		0, "@$way: and no strong lock was held longer");
}

# the same records show the direct change, so that the above means something
my @waits = grep { $_->{for} =~ /^relation $large / } under_pgbench('0002');
my $worst = longest(\@waits);
my $held = sql(q{SELECT max(hold_ms) FROM rm_lock_report() WHERE approach = 'direct' AND rewritten});
note "held $held ms, the longest wait $worst->{ms} ms for $worst->{for}";
cmp_ok(scalar(@waits), '>', 0, '0002: pgbench stands behind the direct change');
cmp_ok($worst->{ms}, '>', $held / 2, '0002: about as long as its lock is held');
sql(q{CALL rm_migrate('0001')});

# ---------------------------------------------------------------------------
# A synchronous standby that is missing
# ---------------------------------------------------------------------------

# The call waits for its lock behind an open transaction when the standby goes
# missing; then it gets the lock, and must not keep it while it waits.
my $strong = qq{
SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.relation = $large AND l.mode IN ('AccessExclusiveLock', 'ExclusiveLock', 'ShareRowExclusiveLock', 'ShareLock')
	AND l.granted AND a.application_name = 'migration'};

sub without_standby
{
	my ($target) = @_;

	my $reader = start_call('reader', 'BEGIN',
		'SELECT count(*) FROM large_record', 'SELECT pg_advisory_lock(1)', 'COMMIT');
	# before that the call would find nobody in its way
	wait_for(q{SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = 'reader' AND wait_event = 'advisory'},
		'the reader does not read');
	my $call = start_call('migration', "CALL rm_migrate('$target')");
	wait_for(qq{SELECT count(*) > 0 FROM pg_locks l JOIN pg_stat_activity a USING (pid)
			WHERE l.relation = $large AND l.mode = 'AccessExclusiveLock' AND a.application_name = 'migration'},
		'the migration does not ask for its lock');
	return ($reader, $call);
}

foreach my $target ('0003', '0005', '0001', '0002', '0001')
{
	sql(q{CALL rm_migrate('0004')}) if $target eq '0005';

	# a session of our own keeps the readers in their transaction
	my $keeper = start_call('keeper', 'SELECT pg_advisory_lock(1)', 'SELECT pg_sleep(600)');
	wait_for(q{SELECT count(*) > 0 FROM pg_locks WHERE locktype = 'advisory' AND objid = 1 AND granted},
		'no keeper');
	my ($reader, $call) = without_standby($target);

	sql(q{ALTER SYSTEM SET synchronous_standby_names = 'missing'});
	$node->reload;
	# only the checkpointer's word counts for commits
	my $probe = start_call('probe', 'CREATE TEMP TABLE t ()');
	wait_for(q{SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = 'probe' AND wait_event = 'SyncRep'},
		'nobody waits for the standby');

	sql(q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'keeper'});
	becomes(
		q{SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = 'migration' AND wait_event = 'SyncRep'},
		"$target: the call waits for the standby");
	is(sql($strong), 0, "$target: and holds no strong lock");
	is( sql(q{
SET synchronous_commit = local; SET lock_timeout = '10 s';
SELECT count(*) > 0 FROM large_record;
INSERT INTO large_record (name, created_at) VALUES ('written 2030-01-01 00:00:00', '2030-01-01 00:00:00');
UPDATE large_record SET name = 'written 2030-01-01 00:00:00', created_at = '2030-01-01 00:00:00' WHERE id = 17;
}), 't', "$target: others read and write");

	# Pushed past one such wait after the other (the commit is kept, the call
	# goes on), it never holds a strong lock in any of them.
	my $held = 0;
	for (1 .. 1000)
	{
		my $state = sql(qq{
SELECT coalesce((SELECT wait_event FROM pg_stat_activity WHERE application_name = 'migration'), 'ended')});
		last if $state eq 'ended';
		$held += sql($strong) if $state eq 'SyncRep';
		sql(q{SELECT pg_cancel_backend(pid) FROM pg_stat_activity
			WHERE application_name = 'migration' AND wait_event = 'SyncRep'});
		usleep(10_000);
	}
	is($held, 0, "$target: nor in any later commit");

	sql(q{ALTER SYSTEM RESET synchronous_standby_names});
	$node->reload;
	finish_call($_) for ($call, $reader, $keeper, $probe);
	# what a cancel has hit outside of such a wait is gone on with
	sql("CALL rm_migrate('$target')");
	is(sql('SELECT rows_wrong FROM rm_lab_check()'), 0, "$target: every row is right");
}

# ---------------------------------------------------------------------------
# An autovacuum that is at work on the table
# ---------------------------------------------------------------------------

sql(q{
ALTER SYSTEM SET autovacuum = on;
ALTER SYSTEM SET autovacuum_naptime = '1s';
ALTER SYSTEM SET deadlock_timeout = '1s';
});
$node->reload;
sql(q{
ALTER TABLE large_record SET (autovacuum_vacuum_threshold = 1, autovacuum_vacuum_scale_factor = 0,
	autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1);
});

foreach my $target ('0003', '0005', '0001')
{
	sql(q{CALL rm_migrate('0004')}) if $target eq '0005';
	sql(q{UPDATE large_record SET name = name WHERE id % 100 = 0});
	becomes(
		qq{SELECT count(*) > 0 FROM pg_stat_progress_vacuum p JOIN pg_stat_activity a USING (pid)
			WHERE p.relid = $large AND a.backend_type = 'autovacuum worker'},
		"$target: autovacuum is at work on the table");
	my $from = -s $node->logfile;
	my $call = start_call('migration',
		'SET risky_migrations.lock_retries = 20', "CALL rm_migrate('$target')");
	ends_well($call, "$target: it gives way, with the deadlock_timeout of the server above the lock's");
	like(slurp_file($node->logfile, $from), qr/canceling autovacuum task/, "$target: the server says so");
}
is(sql('SELECT rows_wrong FROM rm_lab_check()'), 0, 'every row is right');

$node->stop;
done_testing();
