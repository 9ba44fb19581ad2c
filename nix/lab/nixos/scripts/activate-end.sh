
ln -sfn @out@ /run/current-system.new && mv -T /run/current-system.new /run/current-system
exit $_status
